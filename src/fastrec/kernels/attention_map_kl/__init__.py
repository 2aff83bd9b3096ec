"""``attention_map_kl``: KL(teacher's attention || student's) over the student's pattern.

The student attends by an ``AttentionPattern``, the teacher to every valid key. Outside its pattern
the student's probability is 0 and the divergence from a dense teacher infinite; so the teacher's
map is restricted to the student's keys and renormalised. Then only scores of pattern keys matter:
O(L (w + log L) D) work, and never an L x L map.

Source: attention-map distillation of the paper, L = KL(S_teacher || S_student).
"""

from __future__ import annotations

from typing import Any

import torch

from fastrec.errors import ArgumentError, BackendError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import check_length_values, check_lengths, check_scale, length_error
from fastrec.kernels._compiled import Signature, cpu_takes
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels._torch_op import FLOAT_NAMES, define_op
from fastrec.kernels._views import row_view
from fastrec.kernels.attention_map_kl.reference import (
    attention_map_kl_reference,
    divergence_and_gradients,
    reduce,
)
from fastrec.kernels.attention_map_kl.samples import compare, samples
from fastrec.kernels.pattern_tables import check_pattern, decoded, encoded, far_table
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

__all__ = ["SPEC", "attention_map_kl"]

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

BACKENDS = Backends("attention_map_kl", {"cpu": cpu_takes("float32"), "reference": always})


def _check(maps: Maps, lengths: torch.Tensor | None) -> None:
    names = ("teacher_q", "teacher_k", "student_q", "student_k")
    student = maps[2]
    for name, tensor in zip(names, maps, strict=True):
        if tensor.dtype not in FLOAT_NAMES:
            raise DtypeError(name, "float32, bfloat16, float16 or float64", tensor.dtype)
        if tensor.dim() != 4:
            raise ShapeError(name, "shape [B, H, L, D]", list(tensor.shape))
        if tensor.device != student.device:
            raise DeviceError(name, f"student_q's device {student.device}", tensor.device)
    batch, heads, length, _ = student.shape
    for name, tensor, own in zip(names, maps, (maps[0], maps[0], student, student), strict=True):
        expected = [batch, heads, length, own.shape[3]]
        if list(tensor.shape) != expected:
            raise ShapeError(name, f"shape {expected}", list(tensor.shape))
        if heads == 0 or tensor.shape[3] == 0:
            raise ShapeError(name, "at least one head and one dimension", list(tensor.shape))
    check_lengths(lengths, student, "student_q")


def attention_map_kl(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    student_q: torch.Tensor,
    student_k: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    teacher_causal: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Distillation loss between attention maps that are never written down.

    For each valid row i: S_i is the student's softmax over the keys that ``pattern`` shows it, T_i
    the teacher's dense softmax restricted to those keys and renormalised; its loss is
    KL(T_i || S_i) >= 0, 0 where the two agree.

    Args:
        teacher_q, teacher_k: [B, H, L, Dt]; a constant, no gradient flows to it.
        student_q, student_k: [B, H, L, Ds]; Ds may differ from Dt. All float32; bfloat16 and
            float16 are converted; where one is float64 the reference computes in float64.
        pattern: the student's; one that is causal hides later keys from both.
        lengths: int64 [B]; rows and keys at or beyond it do not count and may hold anything.
        teacher_scale, student_scale: factors of the scores; None means D ** -0.5.
        teacher_causal: the teacher sees no later key, where the student's pattern would.
        reduction: "mean" over the valid rows of all sequences and heads; "sum" over them; "none":
            [B, H], each the sum over its rows.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        float32 (float64 where an input is), a scalar or [B, H]. Once differentiable with respect to
        ``student_q`` and ``student_k``; gradients are computed with the value, deterministic and
        the same for any number of threads.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    maps: Maps = (teacher_q, teacher_k, student_q, student_k)
    _check(maps, lengths)
    batch, heads, length, _ = student_q.shape
    check_pattern(pattern, heads)
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError("reduction", "'mean', 'sum' or 'none'", repr(reduction))
    wide = torch.float64 in (x.dtype for x in maps)
    dtype = torch.float64 if wide else torch.float32
    maps = (
        teacher_q.detach().to(dtype),
        teacher_k.detach().to(dtype),
        student_q.to(dtype),
        student_k.to(dtype),
    )
    trained = torch.is_grad_enabled() and (student_q.requires_grad or student_k.requires_grad)
    if trained or torch.compiler.is_compiling():
        sums, _, _ = torch.ops.fastrec.attention_map_kl(
            *maps,
            encoded(pattern),
            trained,
            lengths,
            teacher_scale,
            student_scale,
            teacher_causal,
            backend,
        )
    else:
        sums, _, _ = _run(
            *maps, pattern, False, lengths, teacher_scale, student_scale, teacher_causal, backend
        )
    rows = batch * length if lengths is None else lengths.sum()
    return reduce(sums, rows, reduction)


def _run(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    student_q: torch.Tensor,
    student_k: torch.Tensor,
    pattern: AttentionPattern,
    gradients: bool,
    lengths: torch.Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    teacher_causal: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums [B, H] and the student's gradients (empty where not asked for)."""
    maps = (teacher_q, teacher_k, student_q, student_k)
    batch, heads, length, dims = student_q.shape
    t_scale = teacher_q.shape[3] ** -0.5 if teacher_scale is None else teacher_scale
    s_scale = dims**-0.5 if student_scale is None else student_scale
    check_scale(t_scale, "teacher_scale")
    check_scale(s_scale, "student_scale")
    signature = Signature(student_q.device.type, FLOAT_NAMES[student_q.dtype])
    if BACKENDS.choose(signature, backend) == "reference":
        check_length_values(lengths, length)
        with torch.no_grad():
            sums, dq, dk = divergence_and_gradients(
                *maps,
                pattern,
                lengths=lengths,
                teacher_scale=t_scale,
                student_scale=s_scale,
                teacher_causal=teacher_causal,
            )
        return (sums, dq, dk) if gradients else (sums, sums.new_empty(0), sums.new_empty(0))
    # The tensors are held until the kernel is done with their addresses.
    views = [row_view(x) for x in maps]
    lengths = None if lengths is None else lengths.contiguous()
    table = far_table(pattern, length, heads)
    sums = torch.empty(batch, heads)
    shape = student_q.shape if gradients else (0,)
    dq, dk = torch.empty(shape), torch.empty(shape)
    bad = _compiled.native().attention_map_kl.run(
        *((*view, x.shape[3]) for x, view in views),
        t_scale,
        s_scale,
        teacher_causal,
        sums.data_ptr(),
        dq.data_ptr() if gradients else 0,
        dk.data_ptr() if gradients else 0,
        0 if lengths is None else lengths.data_ptr(),
        min(pattern.window, length),
        pattern.causal,
        table.distances.data_ptr(),
        table.starts.data_ptr(),
        batch,
        heads,
        length,
    )
    if bad >= 0:
        raise length_error(lengths, bad, length)
    return sums, dq, dk


def _op(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    student_q: torch.Tensor,
    student_k: torch.Tensor,
    pattern: str,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _run(teacher_q, teacher_k, student_q, student_k, decoded(pattern), *rest)


def _fake(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    student_q: torch.Tensor,
    student_k: torch.Tensor,
    pattern: str,
    gradients: bool,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = student_q.shape if gradients else (0,)
    sums = student_q.new_empty(student_q.shape[:2])
    return sums, student_q.new_empty(shape), student_q.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.gradients = inputs[5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: torch.Tensor | None, *unused: torch.Tensor | None) -> Any:
    """The kernel left d sums / d student with the value: what is left is to scale it."""
    if grad is not None and torch.is_grad_enabled() and grad.requires_grad:
        raise BackendError("attention_map_kl: it can be differentiated once, not twice")
    if grad is None or not ctx.gradients:
        return (None,) * 11
    dq, dk = ctx.saved_tensors
    factor = grad[:, :, None, None]
    return None, None, factor * dq, factor * dk, *(None,) * 7


define_op(
    "attention_map_kl(Tensor teacher_q, Tensor teacher_k, Tensor student_q, Tensor student_k, "
    "str pattern, bool gradients, Tensor? lengths=None, float? teacher_scale=None, "
    "float? student_scale=None, bool teacher_causal=False, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)",
    _op,
    _fake,
    backward=_backward,
    save=_save,
)

SPEC = OpSpec(
    op_id="attention_map_kl",
    summary="KL between a dense teacher's and a sparse student's attention, no L x L map",
    function=attention_map_kl,
    reference=attention_map_kl_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

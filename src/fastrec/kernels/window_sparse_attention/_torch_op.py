"""``torch.ops.fastrec.window_sparse_attention``: fake, autograd and its backward op."""

from __future__ import annotations

from typing import Any

import torch

from fastrec.kernels._checks import check_length_values, check_start_values
from fastrec.kernels._compiled import Signature, cpu_takes
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Backends, always
from fastrec.kernels._torch_op import FLOAT_NAMES, define_op
from fastrec.kernels.window_sparse_attention import _cpu, _reference_backward
from fastrec.kernels.window_sparse_attention._spec import decode
from fastrec.kernels.window_sparse_attention.reference import window_sparse_attention_reference

BACKENDS = Backends(
    "window_sparse_attention",
    {
        "cpu": cpu_takes("float32", "bfloat16", "float16"),
        "triton": triton_can_run,
        "reference": always,
    },
)


def choose(q: torch.Tensor, backend: str | None) -> str:
    """The backend for this tensor."""
    if backend is None and q.is_cpu and q.dtype in _cpu.DTYPES and BACKENDS.cpu_is_compiled:
        return "cpu"
    return BACKENDS.choose(Signature(q.device.type, FLOAT_NAMES[q.dtype]), backend)


def _check_values(
    q: torch.Tensor, lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    """The checks of values that the compiled kernel makes itself, for the reference."""
    if cu_seqlens is not None:
        check_start_values(cu_seqlens, len(q))
    elif lengths is not None:
        check_length_values(lengths, q.shape[2])


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    offsets: str,
    causal: bool,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    backend: str | None = None,
    *,
    with_lse: bool = True,
) -> tuple[torch.Tensor, Any]:
    """Out and lse (None where it is not wanted), outside autograd."""
    kind, call = choose(q, backend), (window, offsets, causal, lengths, cu_seqlens, scale)
    if kind == "cpu":
        return _cpu.forward(q, k, v, call, with_lse)
    if kind == "triton":
        from fastrec.kernels.window_sparse_attention import _triton

        if q.is_cpu:
            _check_values(q, lengths, cu_seqlens)
        return _triton.forward(q, k, v, call, with_lse)
    _check_values(q, lengths, cu_seqlens)
    result, lse = window_sparse_attention_reference(
        q,
        k,
        v,
        decode(window, offsets, causal),
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        scale=scale,
        return_lse=True,
    )
    out = _cpu.empty_like_rows(q).copy_(result)
    return out, lse.to(_lse_dtype(q), memory_format=torch.contiguous_format, copy=True)


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    offsets: str,
    causal: bool,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = (d_out, d_lse, q, k, v, out, lse)
    kind, call = choose(q, backend), (window, offsets, causal, lengths, cu_seqlens, scale)
    if kind == "cpu":
        return _cpu.backward(rows, call)
    if kind == "triton":
        from fastrec.kernels.window_sparse_attention import _triton

        return _triton.backward(rows, call)
    grads = _reference_backward.backward(rows, call)
    dq, dk, dv = (_cpu.empty_like_rows(x).copy_(x) for x in grads)
    return dq, dk, dv


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Any:
    return _cpu.empty_like_rows(q), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


def _fake_backward(
    d_out: torch.Tensor, d_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> Any:
    return _cpu.empty_like_rows(q), _cpu.empty_like_rows(k), _cpu.empty_like_rows(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, window, offsets, causal, lengths, cu_seqlens, scale, backend = inputs
    ctx.save_for_backward(q, k, v, *output, lengths, cu_seqlens)
    ctx.pattern, ctx.scale, ctx.backend = (window, offsets, causal), scale, backend
    ctx.set_materialize_grads(False)
    ctx.eager = False


def _gradients(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> Any:
    q, k, v, out, lse, lengths, cu_seqlens = ctx.saved_tensors
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    if d_out is not None or d_lse is not None:
        if d_out is None:
            d_out = torch.zeros_like(out)
        # Recording a second derivative is for the op, which refuses it where it is asked for.
        op = torch.ops.fastrec.window_sparse_attention_backward
        run = _backward if ctx.eager and not torch.is_grad_enabled() else op
        rest = (*ctx.pattern, lengths, cu_seqlens, ctx.scale, ctx.backend)
        grads = run(d_out, d_lse, q, k, v, out, lse, *rest)
    return *grads, *(None,) * 7


class Eager(torch.autograd.Function):
    """The op with gradients and without the dispatcher, which costs several times as much."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = forward(*inputs)
        _save(ctx, inputs, output)
        ctx.eager = True
        return output

    backward = staticmethod(_gradients)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("window_sparse_attention: second derivatives are not implemented")


_CALL = (
    "int window, str offsets, bool causal, Tensor? lengths, Tensor? cu_seqlens, float scale, "
    "str? backend=None"
)
define_op(
    f"window_sparse_attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    forward,
    _fake,
    backward=_gradients,
    save=_save,
)
define_op(
    "window_sparse_attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    backward=_no_second_derivative,
)

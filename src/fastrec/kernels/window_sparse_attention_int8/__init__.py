"""``window_sparse_attention_int8``: attention over a pattern in 8-bit integers, inference only.

Scores are exact int32 sums, softmax weights are requantised to 8 bits (255 for the largest score of
a row), and the weighted sum of int8 values is exact again. Every float step is one fp32 operation
in a fixed order, so that all instruction sets and the reference agree to the last bit; see
``csrc/cpu/window_sparse_attention_int8/window_sparse_attention_int8.h``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import (
    check_length_values,
    check_lengths,
    check_like,
    check_start_values,
    check_starts,
    length_error,
    start_error,
)
from fastrec.kernels._compiled import Signature, cpu_can_run
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels._torch_op import define_op
from fastrec.kernels._views import row_view
from fastrec.kernels.pattern_tables import check_pattern, decoded, encoded, far_table
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.kernels.window_sparse_attention_int8.reference import (
    exponent_scale_of,
    window_sparse_attention_int8_reference,
)
from fastrec.kernels.window_sparse_attention_int8.samples import compare, samples

__all__ = ["SPEC", "window_sparse_attention_int8"]

BACKENDS = Backends("window_sparse_attention_int8", {"cpu": cpu_can_run, "reference": always})
MAX_KEYS, MAX_DIMS = 65_536, 256
_DTYPES = {
    "q": (torch.uint8, torch.int8),
    "k": (torch.int8, torch.uint8),
    "v": (torch.float32, torch.int8, torch.uint8),
}


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    v_scale: float | torch.Tensor | None,
) -> None:
    if lengths is not None and cu_seqlens is not None:
        raise ArgumentError("lengths", "None where cu_seqlens is given", "both")
    rank, layout = (4, "[B, H, L, D]") if cu_seqlens is None else (3, "[T, H, D]")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in _DTYPES[name]:
            raise DtypeError(name, " or ".join(map(str, _DTYPES[name])), tensor.dtype)
        if tensor.dim() != rank:
            raise ShapeError(name, f"shape {layout}", list(tensor.shape))
        if cu_seqlens is not None and tensor.shape != q.shape:
            raise ShapeError(name, f"q's shape {list(q.shape)}", list(tensor.shape))
        if tensor.shape[:2] != q.shape[:2] or tensor.shape[-1] != q.shape[-1]:
            raise ShapeError(name, f"q's shape {list(q.shape)}, but for L", list(tensor.shape))
        if name == "v" and tensor.shape != k.shape:
            raise ShapeError(name, f"k's shape {list(k.shape)}", list(tensor.shape))
        if tensor.device != q.device:
            raise DeviceError(name, f"q's device {q.device}", tensor.device)
    batch, heads, dims = q.shape[0], q.shape[1], q.shape[-1]
    if heads == 0 or not 1 <= dims <= MAX_DIMS:
        raise ShapeError("q", f"at least one head and 1 to {MAX_DIMS} dimensions", list(q.shape))
    check_lengths(lengths, q, "q")
    if cu_seqlens is not None:
        check_starts(cu_seqlens, q, "q")
        batch = len(cu_seqlens) - 1
    if v.dtype is torch.float32:
        if v_scale is not None:
            raise ArgumentError("v_scale", "None with a float v, which brings its own", "a scale")
    elif isinstance(v_scale, torch.Tensor):
        check_like("v_scale", v_scale, torch.float32, (batch, heads), q, "q")
    elif v_scale is None:
        raise ArgumentError("v_scale", "a number or float32 [B, H] with v in bytes", None)
    else:
        _check_value_scale(v_scale)


def _check_value_scale(scale: float) -> None:
    if not isinstance(scale, int | float) or not 0 <= scale < math.inf:
        raise _scales_error()


def _check_scale(name: str, value: Any, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ArgumentError(name, f"a finite number {'>=' if zero else '>'} 0", value)


def _check_zero_points(q: int, out_scale: float | None, out: int | None) -> None:
    if out_scale is not None:
        _check_scale("out_scale", out_scale)
    for name, value in (("q_zero_point", q), ("out_zero_point", out)):
        if value is not None and (not isinstance(value, int) or not 0 <= value <= 255):
            raise ArgumentError(name, "an integer in [0, 255]", value)


def _exponent_scale(q_scale: float, k_scale: float, scale: float | None, dims: int) -> float:
    _check_scale("q_scale", q_scale)
    _check_scale("k_scale", k_scale)
    if scale is not None:
        _check_scale("scale", scale, zero=True)
    exponent_scale = exponent_scale_of(q_scale, k_scale, dims**-0.5 if scale is None else scale)
    if exponent_scale > 1e30:  # 2^24 times it must stay a float32
        raise ArgumentError("q_scale", "q_scale * k_scale * scale below 6.9e29", q_scale)
    return exponent_scale


def window_sparse_attention_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    q_scale: float,
    k_scale: float,
    q_zero_point: int | None = None,
    v_scale: float | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention over ``pattern`` in 8-bit integers.

    The real numbers meant are ``q_scale * (q - q_zero_point)`` and ``k_scale * k``. Weights have 8
    bits relative to the largest of their row: one below 1 / 510 of it counts as 0.

    Args:
        q: uint8 or int8 [B, H, L, D], D at most 256; or jagged [T, H, D] with ``cu_seqlens``, as k
            and v then.
        k: int8 around 0 or uint8 around 128, [B, H, Lk, D].
        v: float32, k's shape, which is brought to int8 by the largest valid |v| of each (batch,
            head): the dynamic range of the paper's Value branch; or int8 around 0, or uint8 around
            128, with ``v_scale``.
        pattern: which keys each query sees, at most 65,536 (its sums are int32). Where Lk is
            not L (cross attention), positions of queries and keys count from the same start, and a
            window as wide as both shows all of them.
        q_scale, k_scale: step sizes, > 0.
        q_zero_point: of a uint8 q, default 128; int8 has none.
        v_scale: of a v in bytes: a number or float32 [B, H], >= 0.
        lengths: int64 [B], keys at or beyond it are not seen and never read; None means Lk.
        cu_seqlens: int64 or int32 [B + 1], rising from 0 to T: sequence b is rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Excludes ``lengths``.
        scale: factor of the scores, >= 0; None means D ** -0.5.
        out: None for float32, "uint8" to requantise with ``out_scale`` and ``out_zero_point``.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        q's shape, contiguous, float32 or uint8; a query without keys gives 0. Not
        differentiable.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument, or NaN or infinity among
            the valid values.
        BackendError: the backend asked for can't run.
    """
    _check_tensors(q, k, v, lengths, cu_seqlens, v_scale)
    check_pattern(pattern, q.shape[1])
    if q.dtype is torch.uint8:
        q_zero_point = 128 if q_zero_point is None else q_zero_point
    elif q_zero_point not in (None, 0):
        raise ArgumentError("q_zero_point", "None with an int8 q", q_zero_point)
    if out not in (None, "uint8"):
        raise ArgumentError("out", "None or 'uint8'", repr(out))
    if out is not None:
        if out_scale is None or out_zero_point is None:
            name = "out_scale" if out_scale is None else "out_zero_point"
            raise ArgumentError(name, "a number with out='uint8'", None)
    elif out_scale is not None or out_zero_point is not None:
        name, got = (
            ("out_scale", out_scale)
            if out_scale is not None
            else ("out_zero_point", out_zero_point)
        )
        raise ArgumentError(name, "given with out='uint8' only", got)
    value_scale = None
    if v_scale is not None and not isinstance(v_scale, torch.Tensor):
        value_scale, v_scale = float(v_scale), None
    if torch.compiler.is_compiling():
        return torch.ops.fastrec.window_sparse_attention_int8(
            q,
            k,
            v,
            encoded(pattern),
            q_scale,
            k_scale,
            q_zero_point or 0,
            v_scale=v_scale,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            scale=scale,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
            value_scale=value_scale,
        )
    return _compute(
        q,
        k,
        v,
        pattern,
        q_scale,
        k_scale,
        q_zero_point or 0,
        v_scale=v_scale,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        scale=scale,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        value_scale=value_scale,
        backend=backend,
    )


def _compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    q_scale: float,
    k_scale: float,
    q_zero_point: int,
    *,
    v_scale: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    value_scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The kernel or the reference, after the checks that they share."""
    heads, dims = q.shape[1], q.shape[-1]
    _check_zero_points(q_zero_point, out_scale, out_zero_point)
    exponent_scale = _exponent_scale(q_scale, k_scale, scale, dims)
    length = _longest(q, k, cu_seqlens)
    table = far_table(pattern, length, heads)
    if table.keys > MAX_KEYS:
        raise ArgumentError("pattern", f"at most {MAX_KEYS} keys a query", table.keys)
    compiled = backend is None and q.is_cpu and BACKENDS.cpu_is_compiled
    if not compiled and BACKENDS.choose(Signature(q.device.type), backend) == "reference":
        _check_values(q, k, v, v_scale, lengths, cu_seqlens)
        return window_sparse_attention_int8_reference(
            q,
            k,
            v,
            pattern,
            q_scale=q_scale,
            k_scale=k_scale,
            scale=scale,
            q_zero_point=q_zero_point,
            v_scale=value_scale if v_scale is None else v_scale,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            out=None if out_scale is None else "uint8",
            out_scale=out_scale,
            out_zero_point=out_zero_point,
        )
    (q, q_rows), (k, k_rows), (v, v_rows) = row_view(q), row_view(k), row_view(v)
    v_scale = None if v_scale is None else v_scale.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    batch, rows, key_rows = q.shape[0], q.shape[-2], k.shape[-2]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        batch, rows, key_rows = len(cu_seqlens) - 1, len(q), len(q)
    # Sizes one by one: torch takes half a microsecond longer over a tuple of them.
    result = torch.empty(*q.shape, dtype=torch.float32 if out_scale is None else torch.uint8)
    native = _compiled.native().window_sparse_attention_int8
    status = native.run(
        q_rows,
        q.dtype is torch.uint8,
        q_zero_point,
        k_rows,
        v_rows,
        v.dtype is torch.float32,
        0 if v_scale is None else v_scale.data_ptr(),
        value_scale or 0.0,
        exponent_scale,
        row_view(result)[1],
        out_scale is not None,
        1.0 if out_scale is None else out_scale,
        out_zero_point or 0,
        0 if lengths is None else lengths.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        min(pattern.window, length),
        pattern.causal,
        table.distances.data_ptr(),
        table.starts.data_ptr(),
        batch,
        heads,
        rows,
        dims,
        key_rows,
        k.dtype is torch.uint8,
        v.dtype is torch.uint8,
    )
    if status == native.NOT_FINITE:
        raise _values_error()
    if status == native.BAD_SCALE:
        raise _scales_error()
    if status >= 0 and cu_seqlens is not None:
        raise start_error(cu_seqlens, status, len(q))
    if status >= 0:
        raise length_error(lengths, status, k.shape[2])
    return result


def _check_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Raises what the kernel would, for the reference."""
    if cu_seqlens is not None:
        check_start_values(cu_seqlens, len(q))
    else:
        check_length_values(lengths, k.shape[2])
    if v_scale is not None and not bool((v_scale.isfinite() & (v_scale >= 0)).all()):
        raise _scales_error()
    if v.dtype is torch.float32:
        for b in range(len(v)):
            valid = v[b] if lengths is None else v[b, :, : int(lengths[b])]
            if not bool(valid.isfinite().all()):
                raise _values_error()


def _values_error() -> ArgumentError:
    return ArgumentError("v", "finite numbers", "NaN or infinity")


def _scales_error() -> ArgumentError:
    return ArgumentError("v_scale", "finite numbers >= 0", "another")


def _longest(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    """Rows of the longest sequence, of queries or keys, at most those that there are."""
    if cu_seqlens is None:
        return max(q.shape[2], k.shape[2])
    if len(cu_seqlens) == 1:
        return 0
    return min(max(int(cu_seqlens.diff().max()), 0), len(q))


def _op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: str, *rest: Any, **options: Any
) -> torch.Tensor:
    return _compute(q, k, v, decoded(pattern), *rest, **options)


def _fake(q: torch.Tensor, *args: Any, out_scale: float | None = None, **kwargs: Any) -> Any:
    return q.new_empty(q.shape, dtype=torch.float32 if out_scale is None else torch.uint8)


define_op(
    "window_sparse_attention_int8(Tensor q, Tensor k, Tensor v, str pattern, float q_scale, "
    "float k_scale, int q_zero_point, *, Tensor? v_scale=None, Tensor? lengths=None, "
    "Tensor? cu_seqlens=None, float? scale=None, float? out_scale=None, "
    "int? out_zero_point=None, float? value_scale=None) -> Tensor",
    _op,
    _fake,
    devices=("CPU",),
)

SPEC = OpSpec(
    op_id="window_sparse_attention_int8",
    summary="window and sparse attention in exact 8-bit integer arithmetic",
    function=window_sparse_attention_int8,
    reference=window_sparse_attention_int8_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

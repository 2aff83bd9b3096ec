"""``pointwise_attention_int8``: HSTU's attention in 8-bit integers, inference only.

Scores are exact int32 sums; SiLU weights are rounded to 8 bits by the largest of each run of 64
keys, and sums of weights and values are exact again. Every float step is one fp32 operation in a
fixed order, so that all instruction sets and the reference agree to the last bit; see
``csrc/cpu/pointwise_attention_int8/pointwise_attention_int8.h``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._compiled import Signature, cpu_can_run
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels._torch_op import define_op
from fastrec.kernels._views import row_view
from fastrec.kernels.pointwise_attention import checked_options
from fastrec.kernels.pointwise_attention._cpu import Options, bad_entry, bias_numbers, shape_numbers
from fastrec.kernels.pointwise_attention._torch_op import check_values
from fastrec.kernels.pointwise_attention_int8.reference import pointwise_attention_int8_reference
from fastrec.kernels.pointwise_attention_int8.samples import compare, samples

__all__ = ["SPEC", "pointwise_attention_int8"]

BACKENDS = Backends("pointwise_attention_int8", {"cpu": cpu_can_run, "reference": always})
MAX_DIMS = 256


def _check_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, jagged: bool) -> None:
    rank, layout = (3, "[T, H, D]") if jagged else (4, "[B, H, L, D]")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype is not torch.int8:
            raise DtypeError(name, "int8", x.dtype)
        if x.dim() != rank:
            raise ShapeError(name, f"shape {layout}", list(x.shape))
        if x.shape[:-1] != q.shape[:-1] or (name == "k" and x.shape != q.shape):
            expected = f"q's shape {list(q.shape)}" + (", but for D" if name == "v" else "")
            raise ShapeError(name, expected, list(x.shape))
        if x.device != q.device:
            raise DeviceError(name, f"q's device {q.device}", x.device)
        if x.shape[1] == 0 or not 1 <= x.shape[-1] <= MAX_DIMS:
            expected = f"at least one head and 1 to {MAX_DIMS} dimensions"
            raise ShapeError(name, expected, list(x.shape))


def pointwise_attention_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_scale: float,
    k_scale: float,
    v_scale: float,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    time_edges: torch.Tensor | None = None,
    timestamps: torch.Tensor | None = None,
    query_timestamps: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    targets: torch.Tensor | int | None = None,
    scale: float | None = None,
    norm_length: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """:func:`fastrec.kernels.pointwise_attention` of int8 q, k and v around 0.

    The real numbers meant are ``q_scale * q``, ``k_scale * k`` and ``v_scale * v``.

    Args:
        q, k: int8 [B, H, L, D], or jagged [T, H, D] with ``cu_seqlens``; D from 1 to 256.
        v: int8, as k, with a D of its own.
        q_scale, k_scale, v_scale: step sizes, > 0.
        position_bias, time_bias, time_edges, timestamps, query_timestamps: as for the float op;
            tables are finite float32.
        lengths, cu_seqlens, targets, scale, norm_length, causal: as for the float op.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        float32, q's shape with v's D, a view of contiguous [B, L, H, D] (or contiguous [T, H, D]).
        Not differentiable.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    _check_rows(q, k, v, cu_seqlens is not None)
    for name, value in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ArgumentError(name, "a finite number > 0", value)
    for name, table in (("position_bias", position_bias), ("time_bias", time_bias)):
        known = isinstance(table, torch.Tensor) and not torch.compiler.is_compiling()
        if known and not bool(table.isfinite().all()):  # type: ignore[union-attr]
            raise ArgumentError(name, "finite numbers", "NaN or infinity")
    options = checked_options(
        q,
        (position_bias, time_bias),
        (time_edges, timestamps, query_timestamps),
        (lengths, cu_seqlens, targets),
        scale,
        norm_length,
        causal,
    )
    # 2^22 times it, and a table's entry, must stay a float32.
    if abs(q_scale * k_scale * options[8]) > 1e30:
        raise ArgumentError("q_scale", "|q_scale * k_scale * scale| up to 1e30", q_scale)
    args = (q, k, v, float(q_scale), float(k_scale), float(v_scale), *options, backend)
    if torch.compiler.is_compiling():
        return torch.ops.fastrec.pointwise_attention_int8(*args)
    return _forward(*args)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: float,
    k_scale: float,
    v_scale: float,
    *rest: Any,
) -> torch.Tensor:
    o = Options(*rest[:11])
    out = _empty(q, v)
    if BACKENDS.choose(Signature(q.device.type), rest[11] if len(rest) > 11 else None) != "cpu":
        check_values(q, o)
        result = pointwise_attention_int8_reference(
            q, k, v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, **vars(o)
        )
        return out.copy_(result)
    # The tensors are held until the kernel is done with their addresses.
    tensors, inputs = zip(*(row_view(x) for x in (q, k, v)), strict=True)
    bad, entry = _compiled.native().pointwise_attention_int8.forward(
        shape_numbers(tensors[0], tensors[2], o),
        bias_numbers(o),
        q_scale * k_scale * o.scale,
        v_scale / o.norm(q),
        o.causal,
        *inputs,
        row_view(out)[1],
    )
    if bad:
        raise bad_entry(bad, entry, q, o)
    return out


def _empty(q: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    if q.dim() == 3:
        return v.new_empty(v.shape, dtype=torch.float32)
    batch, heads, rows, dims = v.shape
    return v.new_empty((batch, rows, heads, dims), dtype=torch.float32).transpose(1, 2)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return _empty(q, v)


define_op(
    "pointwise_attention_int8(Tensor q, Tensor k, Tensor v, float q_scale, float k_scale, "
    "float v_scale, Tensor? position_bias, Tensor? time_bias, Tensor? time_edges, "
    "Tensor? timestamps, Tensor? query_timestamps, Tensor? lengths, Tensor? cu_seqlens, "
    "Tensor? targets, float scale, float? norm_length, bool causal, str? backend=None) -> Tensor",
    _forward,
    _fake,
)

SPEC = OpSpec(
    op_id="pointwise_attention_int8",
    summary="HSTU's attention on int8 q, k and v, exact integer sums",
    function=pointwise_attention_int8,
    reference=pointwise_attention_int8_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

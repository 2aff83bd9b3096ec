"""Calls into the compiled kernels: tensors as addresses and strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels import _compiled
from fastrec.kernels._views import row_view
from fastrec.kernels.pointwise_attention.buckets import MAX_TIME

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Options:
    """All but q, k and v, checked and contiguous.

    Attributes:
        position_bias: float [2 P - 1] or [H, 2 P - 1].
        time_bias: float [buckets] or [H, buckets].
        time_edges: int64 [buckets - 1].
        timestamps, query_timestamps: int64 [B, L] or [T].
        lengths, targets: int64 [B].
        cu_seqlens: int64 [B + 1].
        norm_length: N; None: L, of a padded batch.
    """

    position_bias: torch.Tensor | None
    time_bias: torch.Tensor | None
    time_edges: torch.Tensor | None
    timestamps: torch.Tensor | None
    query_timestamps: torch.Tensor | None
    lengths: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    targets: torch.Tensor | None
    scale: float
    norm_length: float | None
    causal: bool

    def norm(self, q: torch.Tensor) -> float:
        """N."""
        return max(q.shape[-2], 1) if self.norm_length is None else self.norm_length


def empty_rows(q: torch.Tensor, dims: int) -> torch.Tensor:
    """An output of ``dims`` a row: a view of contiguous [B, L, H, dims], or [T, H, dims]."""
    if q.dim() == 3:
        return q.new_empty((*q.shape[:2], dims))
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, dims)).transpose(1, 2)


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def shape_numbers(q: torch.Tensor, v: torch.Tensor, o: Options) -> tuple[int, ...]:
    """The sizes as the compiled part takes them; the dtype of int8 numbers is not looked at."""
    if o.cu_seqlens is not None:
        (rows, heads, dims), batch = q.shape, len(o.cu_seqlens) - 1
    else:
        batch, heads, rows, dims = q.shape
    numbers = (DTYPES.get(q.dtype, 0), batch, heads, rows, dims, v.shape[-1])
    return (*numbers, _address(o.lengths), _address(o.cu_seqlens), _address(o.targets))


def bias_numbers(o: Options) -> tuple[int, ...]:
    """The tables and times as the compiled part takes them."""
    position, time = o.position_bias, o.time_bias
    sizes = [0 if x is None else x.shape[-1] for x in (position, time)]
    strides = [size if x is not None and x.dim() == 2 else 0
               for x, size in zip((position, time), sizes, strict=True)]  # fmt: skip
    edges, times = _address(o.time_edges), _address(o.timestamps)
    return (
        *(_address(position), strides[0], (sizes[0] + 1) // 2),
        *(_address(time), strides[1], sizes[1], edges, times, _address(o.query_timestamps)),
    )


def bad_entry(kind: int, entry: int, q: torch.Tensor, o: Options) -> ArgumentError:
    """The error for an entry that is out of order; kinds as the compiled part numbers them."""
    name = ("", "lengths", "cu_seqlens", "targets", "time_edges")[kind]
    expected = {
        "lengths": f"values in [0, {q.shape[-2]}]",
        "cu_seqlens": f"values rising from 0 to T = {len(q)}",
        "targets": "values from 0 to the rows of the sequence",
        "time_edges": f"values in [1, {MAX_TIME}], none below the one before",
    }[name]
    values = getattr(o, name)
    return ArgumentError(name, expected, f"{int(values[entry])} at {entry}")


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options) -> torch.Tensor:
    """Checked arguments."""
    (q, q_rows), (k, k_rows), (v, v_rows) = row_view(q), row_view(k), row_view(v)
    out = empty_rows(q, v.shape[-1])
    bad, entry = _compiled.native().pointwise_attention.forward(
        shape_numbers(q, v, o),
        bias_numbers(o),
        o.scale,
        1.0 / o.norm(q),
        o.causal,
        q_rows,
        k_rows,
        v_rows,
        row_view(out)[1],
    )
    if bad:
        raise bad_entry(bad, entry, q, o)
    return out


def table_gradients(q: torch.Tensor, o: Options) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the tables' gradients, one a head; a head's table starts at 0."""
    heads = q.shape[1]
    tables = (o.position_bias, o.time_bias)
    grads = [None if x is None else x.new_zeros((heads, x.shape[-1])) for x in tables]
    return grads[0], grads[1]


def backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options
) -> tuple[Any, ...]:
    """dq, dk, dv, and per head those of the tables or None."""
    # The tensors are held until the kernel is done with their addresses.
    tensors, inputs = zip(*(row_view(x) for x in (q, k, v, d_out)), strict=True)
    q, k, v, _ = tensors
    dq, dk, dv = (empty_rows(q, x.shape[-1]) for x in (q, k, v))
    d_position, d_time = table_gradients(q, o)
    bad, entry = _compiled.native().pointwise_attention.backward(
        shape_numbers(q, v, o),
        bias_numbers(o),
        o.scale,
        1.0 / o.norm(q),
        o.causal,
        *inputs,
        *(row_view(x)[1] for x in (dq, dk, dv)),
        _address(d_position),
        _address(d_time),
    )
    if bad:
        raise bad_entry(bad, entry, q, o)
    return dq, dk, dv, d_position, d_time

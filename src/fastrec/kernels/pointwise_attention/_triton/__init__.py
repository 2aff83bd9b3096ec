"""``pointwise_attention`` in Triton: launches of its kernels on checked arguments."""

from __future__ import annotations

from typing import Any

import torch

from fastrec.kernels._gpu import ceil_div, device_of
from fastrec.kernels.pointwise_attention._config import LaunchConfig, block_dims, heuristic
from fastrec.kernels.pointwise_attention._cpu import Options, empty_rows, table_gradients
from fastrec.kernels.pointwise_attention._triton.kernels import (
    pointwise_backward_keys,
    pointwise_backward_queries,
    pointwise_forward,
)
from fastrec.kernels.window_sparse_attention._triton import (
    alignment,
    arithmetic,
    readable,
    strides,
)


class _Call:
    """Arguments that the launches of one call share."""

    def __init__(
        self, q: torch.Tensor, v: torch.Tensor, o: Options, aligned: int, backward: bool
    ) -> None:
        jagged = o.cu_seqlens is not None
        if o.cu_seqlens is not None:
            (self.length, self.heads, dims), self.batch = q.shape, len(o.cu_seqlens) - 1
        else:
            self.batch, self.heads, self.length, dims = q.shape
        self.jagged, self.aligned = jagged, aligned
        value_dims = v.shape[-1]
        self.config: LaunchConfig = heuristic(
            self.length,
            max(dims, value_dims),
            q.element_size(),
            aligned=aligned > 1,
            backward=backward,
        )
        bounds = o.lengths if o.cu_seqlens is None else o.cu_seqlens
        position, time = o.position_bias, o.time_bias
        times = (o.time_edges, o.timestamps, o.query_timestamps)
        # Anything with an address where there is none.
        self.pointers = tuple(
            q if x is None else x for x in (bounds, o.targets, position, time, *times)
        )
        sizes = [1 if x is None else x.shape[-1] for x in (position, time)]
        table_strides = [0 if x is None or x.dim() == 1 else x.shape[-1] for x in (position, time)]
        self.numbers = (
            *(o.scale, 1.0 / o.norm(q), self.batch, self.heads, self.length, self.tiles),
            *((sizes[0] + 1) // 2, sizes[1], *table_strides),
        )
        self.constants: dict[str, Any] = {
            "CAUSAL": o.causal,
            "JAGGED": jagged,
            "HAS_LENGTHS": o.lengths is not None,
            "HAS_TARGETS": o.targets is not None,
            "HAS_POSITION": position is not None,
            "HAS_TIME": time is not None,
            "STEPS": max(sizes[1] - 1, 0).bit_length(),
            "ALIGNED": aligned,
            **arithmetic(q),
            "D": dims,
            "DV": value_dims,
            "BLOCK_D": block_dims(dims),
            "BLOCK_DV": block_dims(value_dims),
            "BLOCK_M": self.config.block_rows,
            "BLOCK_N": self.config.block_others,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }

    @property
    def tiles(self) -> int:
        """Tiles of the longest sequence; jagged: slots for those of all sequences."""
        if self.jagged:
            return self.length // self.config.block_rows + self.batch
        return ceil_div(self.length, self.config.block_rows)

    @property
    def grid(self) -> tuple[int]:
        return (self.tiles * self.heads * (1 if self.jagged else self.batch),)

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """As the kernels take them, in units of what all are multiples of."""
        return tuple(stride // self.aligned for x in tensors for stride in strides(x))


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options) -> torch.Tensor:
    """Checked arguments."""
    q, k, v = readable(q), readable(k), readable(v)
    out = empty_rows(q, v.shape[-1])
    if not q.numel():
        return out
    call = _Call(q, v, o, alignment(q, k, v, out), False)
    with device_of(q):
        pointwise_forward[call.grid](
            *(q, k, v, out, *call.pointers, *call.numbers, *call.strides(q, k, v, out)),
            **call.constants,
        )
    return out


def backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options
) -> tuple[Any, ...]:
    """dq, dk, dv, and per head those of the tables or None."""
    q, k, v, d_out = (readable(x) for x in (q, k, v, d_out))
    dq, dk, dv = (empty_rows(q, x.shape[-1]) for x in (q, k, v))
    d_position, d_time = table_gradients(q, o)
    if not q.numel():
        return dq, dk, dv, d_position, d_time
    call = _Call(q, v, o, alignment(q, k, v, d_out, dq, dv), True)
    tables = tuple(q if x is None else x for x in (d_position, d_time))
    inputs = (q, k, v, d_out)
    with device_of(q):
        pointwise_backward_queries[call.grid](
            *(*inputs, dq, *tables, *call.pointers, *call.numbers, *call.strides(*inputs, dq)),
            **call.constants,
        )
        pointwise_backward_keys[call.grid](
            *(*inputs, dk, dv, *call.pointers, *call.numbers, *call.strides(*inputs, dk, dv)),
            **call.constants,
        )
    return dq, dk, dv, d_position, d_time

"""``window_sparse_attention`` in Triton: launches of its kernels on checked arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastrec.kernels._gpu import ceil_div, device_of, fp32_precision, power_of_two
from fastrec.kernels._triton import INTERPRETED
from fastrec.kernels.window_sparse_attention._config import (
    SHORT_ROWS,
    LaunchConfig,
    block_dims,
    heuristic,
    is_short,
    short,
)
from fastrec.kernels.window_sparse_attention._cpu import empty_like_rows
from fastrec.kernels.window_sparse_attention._spec import Call, Rows, decode
from fastrec.kernels.window_sparse_attention._triton.backward_kernels import (
    attention_backward_keys,
    attention_backward_queries,
)
from fastrec.kernels.window_sparse_attention._triton.forward_kernel import attention_forward
from fastrec.kernels.window_sparse_attention._triton.short_kernel import attention_short_forward

LOG2_E = 1.4426950408889634
FAR_BLOCK = 32
# A tile's rows are addressed from its first one in 32 bits.
MAX_ROW_STRIDE = 1 << 22


@functools.lru_cache(maxsize=1024)
def _far(
    window: int, offsets: str, causal: bool, heads: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 distances of all heads, rising in each, and where each head's begin, [H + 1]."""
    pattern = decode(window, offsets, causal)
    rows = [pattern.distances(length, head) for head in range(heads)]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    # Never empty, so that there is an address.
    flat = [distance for row in rows for distance in row] or [0]
    return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (flat, starts))


def far_table(
    window: int, offsets: str, causal: bool, heads: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The far positions on the device. A distance beyond a sequence reaches no key of it, so
    the table of the next power of two serves all lengths up to it."""
    return _far(window, offsets, causal, heads, power_of_two(length, 256, 1 << 31), device)


@functools.lru_cache(maxsize=1024)
def seen_table(
    window: int, offsets: str, causal: bool, heads: int, device: torch.device
) -> torch.Tensor:
    """int8 [H, 512]: whether query i sees key j, at j - i + 256, in sequences of up to 256."""
    pattern = decode(window, offsets, causal)
    steps = torch.arange(-SHORT_ROWS, SHORT_ROWS)
    distances = [pattern.distances(SHORT_ROWS, head) for head in range(heads)]
    far = [torch.isin(steps.abs(), torch.tensor(row, dtype=torch.int64)) for row in distances]
    seen = torch.stack(far) | (steps.abs() <= window)
    if causal:
        seen &= steps <= 0
    return seen.to(device, torch.int8)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels can read it."""
    apart = x.stride(-1) == 1 and abs(x.stride(-3 if x.dim() == 3 else -2)) <= MAX_ROW_STRIDE
    return x if apart else x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, head and row; of [B, H, L, ...] or jagged [T, H, ...]."""
    if x.dim() == 4:
        return x.stride()[:3]
    return 0, x.stride(1), x.stride(0)


def row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """The same of a number a row: [B, H, L] or [T, H]."""
    return x.stride() if x.dim() == 3 else (0, x.stride(1), x.stride(0))


def alignment(*tensors: torch.Tensor) -> int:
    """How many elements' multiple all strides are, so far as a load can gain from it."""
    wide = 16 // tensors[0].element_size()
    aligned = all(stride % wide == 0 for x in tensors for stride in strides(x))
    return wide if aligned else 1


class Launch:
    """Sizes, tables and constants that all launches of one call share."""

    def __init__(
        self,
        q: torch.Tensor,
        pattern: tuple[int, str, bool],
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> None:
        window, offsets, causal = pattern
        self.jagged = cu_seqlens is not None
        if cu_seqlens is not None:
            self.length, self.heads, self.dims = q.shape
            self.batch = len(cu_seqlens) - 1
        else:
            self.batch, self.heads, self.length, self.dims = q.shape
        self.window = min(window, self.length)
        bounds = lengths if cu_seqlens is None else cu_seqlens
        self.far = far_table(window, offsets, causal, self.heads, self.length, q.device)
        # Without bounds any tensor serves: the kernel wants an address and does not read it.
        self.bounds = self.far[0] if bounds is None else bounds
        self.itemsize = q.element_size()
        self.constants: dict[str, Any] = {
            "CAUSAL": causal,
            "JAGGED": self.jagged,
            "HAS_LENGTHS": lengths is not None,
            **arithmetic(q),
            "D": self.dims,
            "BLOCK_D": block_dims(self.dims),
            "BLOCK_F": FAR_BLOCK,
        }

    def config(self, aligned: int, *, backward: bool = False) -> LaunchConfig:
        """How to launch for strides that are multiples of ``aligned`` elements."""
        return heuristic(
            self.length,
            self.window,
            self.dims,
            self.itemsize,
            aligned=aligned > 1,
            backward=backward,
        )

    def tiles(self, block_rows: int) -> int:
        """Tiles of the longest sequence; jagged: slots for those of all sequences."""
        if self.jagged:
            return self.length // block_rows + self.batch
        return ceil_div(self.length, block_rows)

    def programs(self, block_rows: int) -> tuple[int]:
        """The grid."""
        return (self.tiles(block_rows) * self.heads * (1 if self.jagged else self.batch),)

    def sizes(self, block_rows: int) -> tuple[int, int, int, int, int]:
        """B, H, L, tiles and window, as the kernels take them."""
        return self.batch, self.heads, self.length, self.tiles(block_rows), self.window


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result and, where it is wanted, the log-sum-exp of each row.

    Args:
        q, k, v, with_lse: as in the op.
        call: checked.
    """
    window, offsets, causal, lengths, cu_seqlens, scale = call
    q, k, v = readable(q), readable(k), readable(v)
    out = empty_like_rows(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if with_lse else None
    if not q.numel():
        return out, lse
    tensors = (q, k, v, out)
    aligned = alignment(*tensors)
    if cu_seqlens is None and is_short(q.shape[2], q.shape[3], q.element_size()):
        seen = seen_table(window, offsets, causal, q.shape[1], q.device)
        _short_forward(tensors, lse, lengths, seen, scale, aligned)
        return out, lse
    launch = Launch(q, (window, offsets, causal), lengths, cu_seqlens)
    config = launch.config(aligned)
    with device_of(q):
        attention_forward[launch.programs(config.block_rows)](
            q,
            k,
            v,
            out,
            out if lse is None else lse,
            launch.bounds,
            *launch.far,
            scale * LOG2_E,
            *launch.sizes(config.block_rows),
            *(stride // aligned for x in tensors for stride in strides(x)),
            *((0, 0, 0) if lse is None else row_strides(lse)),
            WITH_LSE=lse is not None,
            ALIGNED=aligned,
            BLOCK_M=config.block_rows,
            BLOCK_N=config.block_others,
            FAR_STAGES=config.far_stages,
            **launch.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def arithmetic(q: torch.Tensor) -> dict[str, Any]:
    """How the kernels multiply and round numbers of q's dtype."""
    interpreted = INTERPRETED and q.dtype is torch.bfloat16
    precision = fp32_precision() if q.dtype is torch.float32 else "ieee"
    return {"PRECISION": precision, "WIDEN": interpreted, "ROUND": interpreted}


def _short_forward(
    tensors: tuple[torch.Tensor, ...],
    lse: torch.Tensor | None,
    lengths: torch.Tensor | None,
    seen: torch.Tensor,
    scale: float,
    aligned: int,
) -> None:
    q, _, _, out = tensors
    batch, heads, length, dims = q.shape
    config = short(length, dims, q.element_size())
    with device_of(q):
        attention_short_forward[(batch * heads,)](
            *(*tensors, out if lse is None else lse, seen if lengths is None else lengths, seen),
            scale * LOG2_E,
            heads,
            length,
            *(stride // aligned for x in tensors for stride in strides(x)),
            HAS_LENGTHS=lengths is not None,
            WITH_LSE=lse is not None,
            ALIGNED=aligned,
            **arithmetic(q),
            D=dims,
            BLOCK_D=block_dims(dims),
            BLOCK_M=config.block_rows,
            BLOCK_N=config.block_others,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def backward(rows: Rows, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv; recomputes the weights from lse."""
    d_out, d_lse, q, k, v, out, lse = rows
    window, offsets, causal, lengths, cu_seqlens, scale = call
    q, k, v, out, d_out = (readable(x) for x in (q, k, v, out, d_out))
    dq, dk, dv = empty_like_rows(q), empty_like_rows(k), empty_like_rows(v)
    if not q.numel():
        return dq, dk, dv
    lse = lse.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    delta = torch.empty_like(lse)
    launch = Launch(q, (window, offsets, causal), lengths, cu_seqlens)
    by_queries, by_keys = (q, k, v, out, d_out, dq), (q, k, v, d_out, dk)
    aligned = alignment(*by_queries, dk)
    config = launch.config(aligned, backward=True)
    grid = launch.programs(config.block_rows)
    options: dict[str, Any] = {
        "ALIGNED": aligned,
        "BLOCK_M": config.block_rows,
        "BLOCK_N": config.block_others,
        "FAR_STAGES": config.far_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **launch.constants,
    }
    with device_of(q):
        attention_backward_queries[grid](
            *(q, k, v, out, d_out, lse, lse if d_lse is None else d_lse, delta, dq),
            launch.bounds,
            *launch.far,
            scale,
            *launch.sizes(config.block_rows),
            *(stride // aligned for x in by_queries for stride in strides(x)),
            *row_strides(lse),
            HAS_D_LSE=d_lse is not None,
            **options,
        )
        attention_backward_keys[grid](
            *(q, k, v, d_out, lse, delta, dk, dv),
            launch.bounds,
            *launch.far,
            scale,
            *launch.sizes(config.block_rows),
            *(stride // aligned for x in by_keys for stride in strides(x)),
            *row_strides(lse),
            **options,
        )
    return dq, dk, dv

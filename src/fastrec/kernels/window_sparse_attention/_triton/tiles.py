"""Tiles of rows: where a program's lie, how they are loaded, which far positions they reach.

A program works for one tile of rows of one head of one sequence. Position i of a sequence is row
i of that head: ``base + i * stride``, D contiguous. All that depends on the batch or the length is
an argument that Triton does not specialise on, so no new length compiles a kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(
    bounds_ptr,
    B,
    H,
    L,
    tiles,
    BLOCK: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """(batch, head, the sequence's first row in T, its rows, its valid keys, the tile's first row).

    ``tiles`` is the number of tiles of the longest sequence; in a jagged batch that of all
    sequences at most, T // BLOCK + B: sequence b owns the slots from cu_seqlens[b] // BLOCK + b,
    one more than those that it fills. A slot past the end starts beyond the rows. Bounds from
    outside their range are moved into it: nothing is read that is not there.
    """
    program = tl.program_id(0)
    slot = program % tiles
    head = (program // tiles) % H
    batch = program // tiles // H
    begin = 0
    rows = L
    keys = L
    if JAGGED:
        # The last sequence whose slots begin at this one or before it.
        low = 0
        high = B
        while high - low > 1:
            middle = (low + high) // 2
            at = tl.minimum(tl.maximum(tl.load(bounds_ptr + middle), 0), L).to(tl.int32)
            behind = at // BLOCK + middle > slot
            high = tl.where(behind, middle, high)
            low = tl.where(behind, low, middle)
        batch = low
        begin = tl.load(bounds_ptr + batch).to(tl.int32)
        begin = tl.minimum(tl.maximum(begin, 0), L)
        end = tl.minimum(tl.load(bounds_ptr + batch + 1).to(tl.int32), L)
        rows = tl.maximum(end - begin, 0)
        keys = rows
        slot = slot - (begin // BLOCK + batch)
    if HAS_LENGTHS:
        keys = tl.load(bounds_ptr + batch).to(tl.int32)
        keys = tl.minimum(tl.maximum(keys, 0), L)
    return batch, head, begin, rows, keys, slot * BLOCK


@triton.jit
def base_of(ptr, batch, head, begin, stride_b, stride_h, stride_l, JAGGED: tl.constexpr):
    """The address of row 0 of one head of one sequence."""
    base = ptr + head.to(tl.int64) * stride_h
    if JAGGED:
        return base + begin.to(tl.int64) * stride_l
    return base + batch.to(tl.int64) * stride_b


@triton.jit
def load_rows(base, stride, first, local, lower, upper, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first + local, [BLOCK, BLOCK_D]; zeros outside [lower, upper) and beyond D.

    Only the tile's address is 64 bits wide, so that shifted tiles share their elements' offsets.
    """
    d = tl.arange(0, BLOCK_D)
    at = first + local
    inside = ((at >= lower) & (at < upper))[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    pointers = (base + stride.to(tl.int64) * first) + (local * stride)[:, None] + d[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_numbers(base, stride, first, local, upper):
    """One float32 for each of the rows first + local; zeros outside [0, upper)."""
    at = first + local
    return tl.load(base + at.to(tl.int64) * stride, mask=(at >= 0) & (at < upper), other=0.0)


@triton.jit
def load_lse(base, stride, first, local, upper):
    """The rows' log-sum-exp in powers of two; 0 for a row that saw nothing and is masked."""
    lse = load_numbers(base, stride, first, local, upper)
    return tl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b on matrix units, summed in float32; WIDEN where the interpreter can't multiply them."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def store_rows(base, stride, first, local, upper, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes rows first + local below ``upper``."""
    d = tl.arange(0, BLOCK_D)
    inside = ((first + local) < upper)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    pointers = (base + stride.to(tl.int64) * first) + (local * stride)[:, None] + d[None, :]
    tl.store(pointers, x, mask=inside)


@triton.jit
def far_range(far_ptr, starts_ptr, head, limit, BLOCK: tl.constexpr):
    """The distances of a head that are below ``limit``, which are the first ones: (begin, end)."""
    begin = tl.load(starts_ptr + head)
    end = tl.load(starts_ptr + head + 1)
    count = 0
    for n in range(begin, end, BLOCK):
        at = n + tl.arange(0, BLOCK)
        # [BLOCK]
        distance = tl.load(far_ptr + at, mask=at < end, other=0x7FFFFFFF)
        count += tl.sum((distance < limit).to(tl.int32), axis=0)
    return begin, begin + count

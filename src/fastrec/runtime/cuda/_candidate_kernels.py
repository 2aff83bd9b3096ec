"""The candidates' launch: lookups, norm, cross attention, and the tower's input."""

import triton
import triton.language as tl

from fastrec.runtime.cuda._tiles import (
    attended,
    finished,
    looked_up,
    no_sum,
    normalised,
    operand,
    times,
    to_type,
)


@triton.jit
def candidates(
    header_ptr,
    lengths_ptr,
    ids0_ptr,
    ids1_ptr,
    ids2_ptr,
    ids3_ptr,
    table0_ptr,
    table1_ptr,
    table2_ptr,
    table3_ptr,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    norm_ptr,
    query_w_ptr,
    query_p_ptr,
    kv_ptr,
    out_w_ptr,
    out_p_ptr,
    tower_p_ptr,
    z_ptr,
    epsilon,
    scale,
    KINDS: tl.constexpr,
    SIZES: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Program (tile of candidates, user): z = [candidate, context, candidate * context] as the
    tower's first layer multiplies it, from kv [B, L, 2 D]."""
    user, row = tl.program_id(1), tl.program_id(0) * R + tl.arange(0, R)
    size = tl.load(header_ptr + 2)
    if user >= tl.load(header_ptr):
        return
    if tl.program_id(0) * R >= size:
        return
    rows, valid = user * size + row, row < size
    x = tl.zeros([R, BLOCK_D], tl.float32)
    x = looked_up(
        x, ids0_ptr, table0_ptr, scale0_ptr, rows, valid, row, KINDS[0], SIZES[0], D, BLOCK_D
    )
    x = looked_up(
        x, ids1_ptr, table1_ptr, scale1_ptr, rows, valid, row, KINDS[1], SIZES[1], D, BLOCK_D
    )
    x = looked_up(
        x, ids2_ptr, table2_ptr, scale2_ptr, rows, valid, row, KINDS[2], SIZES[2], D, BLOCK_D
    )
    x = looked_up(
        x, ids3_ptr, table3_ptr, scale3_ptr, rows, valid, row, KINDS[3], SIZES[3], D, BLOCK_D
    )
    candidate = normalised(x, norm_ptr, epsilon, D, BLOCK_D)

    WIDTH: tl.constexpr = D // HEADS
    c, h = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_HEAD)
    length = tl.load(lengths_ptr + user)
    keys_ptr = kv_ptr + (user * tl.load(header_ptr + 1)).to(tl.int64) * (2 * D)
    a = operand(candidate, query_w_ptr, query_p_ptr)
    acc = no_sum(out_w_ptr, R, BLOCK_D)
    for head in range(HEADS):
        n = head * WIDTH + h
        mine = h < WIDTH
        # Beyond the head: nothing, not the next head's.
        inside = mine[:, None] & (c < D)[None, :]
        w = tl.trans(tl.load(query_w_ptr + n[:, None] * D + c[None, :], mask=inside, other=0))
        q = times(a, w, no_sum(query_w_ptr, R, BLOCK_HEAD), PRECISION)
        q = tl.where(mine[None, :], finished(q, query_p_ptr, n, D, 0), 0.0)
        k_ptr = keys_ptr + head * WIDTH
        context = attended(
            to_type(q, kv_ptr.dtype.element_ty),
            k_ptr,
            k_ptr + D,
            2 * D,
            length,
            scale,
            PRECISION,
            R,
            WIDTH,
            BLOCK_HEAD,
            BLOCK_KEYS,
        )
        part = mine[None, :] & (c < D)[:, None]
        w = tl.trans(tl.load(out_w_ptr + c[:, None] * D + n[None, :], mask=part, other=0))
        acc = times(operand(context, out_w_ptr, out_p_ptr), w, acc, PRECISION)
    context = tl.where(length > 0, finished(acc, out_p_ptr, c, D, 0), 0.0)

    at = z_ptr + rows.to(tl.int64)[:, None] * Z_STRIDE + c[None, :]
    inside = valid[:, None] & (c < D)[None, :]
    tl.store(at, operand(candidate, z_ptr, tower_p_ptr), mask=inside)
    tl.store(at + D, operand(context, z_ptr, tower_p_ptr), mask=inside)
    tl.store(at + 2 * D, operand(candidate * context, z_ptr, tower_p_ptr), mask=inside)

"""The history's launches: lookups with the first projection, and a launch an encoder block."""

import triton
import triton.language as tl

from fastrec.runtime.cuda._tiles import (
    attended,
    finished,
    looked_up,
    no_sum,
    normalised,
    operand,
    projected,
    times,
    weights,
)


@triton.jit
def history(
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
    w_ptr,
    p_ptr,
    x_ptr,
    y_ptr,
    epsilon,
    KINDS: tl.constexpr,
    SIZES: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile of rows, user): x [B, L, D] float32 and its projection y [B, L, N]."""
    user, row = tl.program_id(1), tl.program_id(0) * R + tl.arange(0, R)
    length = tl.load(lengths_ptr + user)
    if tl.program_id(0) * R >= length:
        return
    rows = user * tl.load(header_ptr + 1) + row
    valid, age = row < length, length - 1 - row
    x = tl.zeros([R, BLOCK_D], tl.float32)
    x = looked_up(
        x, ids0_ptr, table0_ptr, scale0_ptr, rows, valid, age, KINDS[0], SIZES[0], D, BLOCK_D
    )
    x = looked_up(
        x, ids1_ptr, table1_ptr, scale1_ptr, rows, valid, age, KINDS[1], SIZES[1], D, BLOCK_D
    )
    x = looked_up(
        x, ids2_ptr, table2_ptr, scale2_ptr, rows, valid, age, KINDS[2], SIZES[2], D, BLOCK_D
    )
    x = looked_up(
        x, ids3_ptr, table3_ptr, scale3_ptr, rows, valid, age, KINDS[3], SIZES[3], D, BLOCK_D
    )
    c = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * D + c[None, :]
    tl.store(x_ptr + at, x, mask=valid[:, None] & (c < D)[None, :])
    y = normalised(x, norm_ptr, epsilon, D, BLOCK_D)
    projected(y, y_ptr, rows, valid, w_ptr, p_ptr, N, D, PRECISION, R, BLOCK_D, BLOCK_N)


@triton.jit
def encoder_block(
    header_ptr,
    lengths_ptr,
    x_ptr,
    qkv_ptr,
    y_ptr,
    out_w_ptr,
    out_p_ptr,
    norm_ptr,
    first_w_ptr,
    first_p_ptr,
    second_w_ptr,
    second_p_ptr,
    next_norm_ptr,
    next_w_ptr,
    next_p_ptr,
    scale,
    epsilon,
    next_epsilon,
    N: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile of rows, user): one block of x [B, L, D], in place, from qkv [B, L, 3 D]; y
    [B, L, N] is the next stage's projection of its norm. Rows beyond a length are left out."""
    user, row = tl.program_id(1), tl.program_id(0) * R + tl.arange(0, R)
    length = tl.load(lengths_ptr + user)
    if tl.program_id(0) * R >= length:
        return
    first_row = user * tl.load(header_ptr + 1)
    rows = first_row + row
    valid = row < length
    WIDTH: tl.constexpr = D // HEADS
    c, h = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_HEAD)
    keys_ptr = qkv_ptr + first_row.to(tl.int64) * (3 * D)

    acc = no_sum(out_w_ptr, R, BLOCK_D)
    for head in range(HEADS):
        inside = valid[:, None] & (h < WIDTH)[None, :]
        at = row[:, None] * (3 * D) + head * WIDTH + h[None, :]
        q = tl.load(keys_ptr + at, mask=inside, other=0.0)
        k_ptr = keys_ptr + D + head * WIDTH
        context = attended(
            q, k_ptr, k_ptr + D, 3 * D, length, scale, PRECISION, R, WIDTH, BLOCK_HEAD, BLOCK_KEYS
        )
        # The output projection's inputs of this head: [BLOCK_HEAD, BLOCK_D]
        part = (h < WIDTH)[None, :] & (c < D)[:, None]
        at = out_w_ptr + c[:, None] * D + head * WIDTH + h[None, :]
        w = tl.trans(tl.load(at, mask=part, other=0))
        acc = times(operand(context, out_w_ptr, out_p_ptr), w, acc, PRECISION)

    at = x_ptr + rows.to(tl.int64)[:, None] * D + c[None, :]
    inside = valid[:, None] & (c < D)[None, :]
    x = tl.load(at, mask=inside, other=0.0) + finished(acc, out_p_ptr, c, D, 0)
    a = operand(normalised(x, norm_ptr, epsilon, D, BLOCK_D), first_w_ptr, first_p_ptr)
    acc = no_sum(second_w_ptr, R, BLOCK_D)
    for first in range(0, HIDDEN, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        hidden = times(
            a, weights(first_w_ptr, n, c, HIDDEN, D), no_sum(first_w_ptr, R, BLOCK_N), PRECISION
        )
        hidden = finished(hidden, first_p_ptr, n, HIDDEN, ACTIVATION)
        w = weights(second_w_ptr, c, n, D, HIDDEN)
        acc = times(operand(hidden, second_w_ptr, second_p_ptr), w, acc, PRECISION)
    x += finished(acc, second_p_ptr, c, D, 0)
    tl.store(at, x, mask=inside)
    y = normalised(x, next_norm_ptr, next_epsilon, D, BLOCK_D)
    projected(y, y_ptr, rows, valid, next_w_ptr, next_p_ptr, N, D, PRECISION, R, BLOCK_D, BLOCK_N)

"""The ranker's launches. Sizes of a request (users, L, m) are data, read from a header on the
device: one compiled kernel and one captured graph serve every batch, history and candidate count.

    history        lookups, their sum, norm and the first block's q, k, v
    encoder_block  attention, output projection, feed-forward part, and the next q, k, v (or k, v)
    candidates     lookups, norm, cross attention, and the tower's input
    tower          all layers and the scores, persistent, with barriers across the grid
    tower_layer, tower_scores   the same tiles, a launch a layer
"""

import triton
import triton.language as tl

from fastrec.runtime.cuda._tiles import (
    HEAD,
    attended,
    finished,
    grid_barrier,
    looked_up,
    no_sum,
    normalised,
    operand,
    projected,
    quantised,
    times,
    to_type,
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


@triton.jit
def _tower_tile(
    work_ptr,
    layer_ptr,
    w_ptr,
    p_ptr,
    score_ptr,
    parts_ptr,
    rows,
    capacity,
    tile,
    LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one layer. ``layer_ptr``: N, K, and where weights, parameters, input and output
    begin. The LAST layer's tile is multiplied with the score's weights where it is, and leaves one
    sum a row (of exact integers where the score's layer is int8), so that it never travels."""
    N = tl.multiple_of(tl.load(layer_ptr).to(tl.int32), 32)
    K = tl.multiple_of(tl.load(layer_ptr + 1).to(tl.int32), 32)
    w_ptr += tl.multiple_of(tl.load(layer_ptr + 2), 32)
    p_ptr += tl.multiple_of(tl.load(layer_ptr + 3), 16)
    x_ptr = work_ptr + tl.multiple_of(tl.load(layer_ptr + 4), 32)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n = tile % tiles_n
    m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = no_sum(w_ptr, BLOCK_M, BLOCK_N)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * K
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_rows + k[None, :], mask=(m < rows)[:, None] & (k < K)[None, :], other=0)
        acc = times(x, weights(w_ptr, n, k, N, K), acc, PRECISION)
    y = finished(acc, p_ptr, n, N, ACTIVATION)
    if LAST:
        score = tl.load(score_ptr + HEAD + n, mask=n < N, other=0.0)
        if parts_ptr.dtype.element_ty == tl.int32:
            q = quantised(y, tl.load(score_ptr + 1), tl.load(score_ptr + 2))
            part = tl.sum(q.to(tl.int32) * score.to(tl.int32)[None, :], axis=1)
        else:
            part = tl.sum(y * score[None, :], axis=1)
        tl.store(parts_ptr + tile_n * capacity + m, part, mask=m < rows)
    else:
        at = work_ptr + tl.multiple_of(tl.load(layer_ptr + 5), 32)
        at = at + m.to(tl.int64)[:, None] * N + n[None, :]
        inside = (m < rows)[:, None] & (n < N)[None, :]
        if work_ptr.dtype.element_ty == tl.int8:
            tl.store(at, quantised(y, tl.load(p_ptr + 2), tl.load(p_ptr + 3)), mask=inside)
        else:
            tl.store(at, to_type(y, work_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores_tile(
    score_ptr, parts_ptr, scores_ptr, rows, capacity, PARTS, tile, BLOCK: tl.constexpr
):
    """Scores of BLOCK rows: the bias and the sums of the last layer's tiles, in their order."""
    m = tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * capacity + m, mask=m < rows, other=0)
    if parts_ptr.dtype.element_ty == tl.int32:
        shift = tl.load(score_ptr + 4).to(tl.int32, bitcast=True)
        value = (total - shift).to(tl.float32) * tl.load(score_ptr + 3)
    else:
        value = total
    tl.store(scores_ptr + m, value + tl.load(score_ptr), mask=m < rows)


@triton.jit
def tower(
    header_ptr,
    work_ptr,
    layers_ptr,
    w_ptr,
    p_ptr,
    score_ptr,
    parts_ptr,
    scores_ptr,
    counter_ptr,
    capacity,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The whole tower: every program works through its share of each layer's tiles. What a layer
    writes is read from L2 by the next. ``capacity``: rows that the buffers hold."""
    rows = tl.load(header_ptr) * tl.load(header_ptr + 2)
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    for layer in range(LAYERS - 1):
        layer_ptr = layers_ptr + 8 * layer
        tiles = tiles_m * tl.cdiv(tl.load(layer_ptr).to(tl.int32), BLOCK_N)
        for tile in range(program, tiles, programs):
            _tower_tile(
                work_ptr,
                layer_ptr,
                w_ptr,
                p_ptr,
                score_ptr,
                parts_ptr,
                rows,
                capacity,
                tile,
                False,
                ACTIVATION,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
        grid_barrier(counter_ptr, programs)
    for tile in range(program, tiles_m * PARTS, programs):
        _tower_tile(
            work_ptr,
            layers_ptr + 8 * (LAYERS - 1),
            w_ptr,
            p_ptr,
            score_ptr,
            parts_ptr,
            rows,
            capacity,
            tile,
            True,
            ACTIVATION,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    grid_barrier(counter_ptr, programs)
    for tile in range(program, tl.cdiv(rows, 32), programs):
        _scores_tile(score_ptr, parts_ptr, scores_ptr, rows, capacity, PARTS, tile, 32)


@triton.jit
def tower_layer(
    header_ptr,
    work_ptr,
    layer_ptr,
    w_ptr,
    p_ptr,
    score_ptr,
    parts_ptr,
    capacity,
    LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One layer of the tower, a program a tile."""
    rows = tl.load(header_ptr) * tl.load(header_ptr + 2)
    _tower_tile(
        work_ptr,
        layer_ptr,
        w_ptr,
        p_ptr,
        score_ptr,
        parts_ptr,
        rows,
        capacity,
        tl.program_id(0),
        LAST,
        ACTIVATION,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def tower_scores(header_ptr, score_ptr, parts_ptr, scores_ptr, capacity, PARTS: tl.constexpr):
    """The scores, a program 32 rows."""
    rows = tl.load(header_ptr) * tl.load(header_ptr + 2)
    _scores_tile(score_ptr, parts_ptr, scores_ptr, rows, capacity, PARTS, tl.program_id(0), 32)

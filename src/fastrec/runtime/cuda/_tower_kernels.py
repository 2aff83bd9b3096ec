"""The tower: all layers and the scores in one persistent launch, or a launch a layer."""

import triton
import triton.language as tl

from fastrec.runtime.cuda._tiles import (
    HEAD,
    finished,
    grid_barrier,
    no_sum,
    quantised,
    times,
    to_type,
    weights,
)


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

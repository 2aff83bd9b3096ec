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
def _kept_products(x_words, w_ptr, index_ptr, first, last, valid, acc):
    """acc + the products of a panel's steps: 32 kept groups of 4 inputs each by 32 outputs.

    ``x_words``: rows of activations as words of 4 inputs, [BLOCK_M, 1]. One product an input of the
    four, so that bytes are shifted and never rearranged.
    """
    i = tl.arange(0, 32)
    # [32 outputs, 32 groups]
    at = w_ptr + first.to(tl.int64) * 4096 + i[:, None] * 32 + i[None, :]
    groups = index_ptr + first * 32 + i
    for _ in range(last - first):
        # [BLOCK_M, 32 groups]
        words = tl.load(x_words + tl.load(groups)[None, :], mask=valid[:, None], other=0)
        for part in tl.static_range(4):
            x = (words >> (8 * part)).to(tl.int8)
            acc = tl.dot(x, tl.trans(tl.load(at + 1024 * part)), acc, out_dtype=tl.int32)
        at += 4096
        groups += 32
    return acc


@triton.jit
def _tower_tile(
    work_ptr,
    layer_ptr,
    w_ptr,
    index_ptr,
    starts_ptr,
    p_ptr,
    score_ptr,
    parts_ptr,
    rows,
    capacity,
    tile,
    LAST: tl.constexpr,
    SKIPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one layer. ``layer_ptr``: N, K, and where weights, parameters, input, output and
    the panels' starts begin. SKIPS: the weights are the kept groups alone, and a tile is a panel.

    The LAST layer's tile is multiplied with the score's weights where it is, and leaves one sum a
    row (of exact integers where the score's layer is int8), so that it never travels."""
    N = tl.multiple_of(tl.load(layer_ptr).to(tl.int32), 32)
    K = tl.multiple_of(tl.load(layer_ptr + 1).to(tl.int32), 32)
    p_ptr += tl.multiple_of(tl.load(layer_ptr + 3), 16)
    x_begin = tl.multiple_of(tl.load(layer_ptr + 4), 32)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n = tile % tiles_n
    m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = no_sum(w_ptr, BLOCK_M, BLOCK_N)
    if SKIPS:
        panel = starts_ptr + tl.load(layer_ptr + 6) + tile_n
        x_words = (work_ptr + x_begin).to(tl.pointer_type(tl.int32))
        x_words += m.to(tl.int64)[:, None] * (K // 4)
        first, last = tl.load(panel), tl.load(panel + 1)
        acc = _kept_products(x_words, w_ptr, index_ptr, first, last, m < rows, acc)
    else:
        w_ptr += tl.multiple_of(tl.load(layer_ptr + 2), 32)
        x_rows = work_ptr + x_begin + m.to(tl.int64)[:, None] * K
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
    index_ptr,
    starts_ptr,
    p_ptr,
    score_ptr,
    parts_ptr,
    scores_ptr,
    counter_ptr,
    capacity,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,
    SKIPS: tl.constexpr,
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
                index_ptr,
                starts_ptr,
                p_ptr,
                score_ptr,
                parts_ptr,
                rows,
                capacity,
                tile,
                False,
                SKIPS,
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
            index_ptr,
            starts_ptr,
            p_ptr,
            score_ptr,
            parts_ptr,
            rows,
            capacity,
            tile,
            True,
            SKIPS,
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
    index_ptr,
    starts_ptr,
    p_ptr,
    score_ptr,
    parts_ptr,
    capacity,
    LAST: tl.constexpr,
    SKIPS: tl.constexpr,
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
        index_ptr,
        starts_ptr,
        p_ptr,
        score_ptr,
        parts_ptr,
        rows,
        capacity,
        tl.program_id(0),
        LAST,
        SKIPS,
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

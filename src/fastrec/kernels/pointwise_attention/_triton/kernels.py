"""Triton kernels of ``pointwise_attention``: the forward, dq by queries, dk and dv by keys.

A program works for one tile of rows of one head of one sequence. Its keys are the blocks of the
history that it sees, then the block of its own targets, each of which sees itself. Nothing is kept
from the forward: scores are recomputed. dq, dk and dv are gathered in a fixed order; gradients of
the tables are added atomically, in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrec.kernels._triton import rounded
from fastrec.kernels.window_sparse_attention._triton.tiles import (
    base_of,
    dot,
    load_rows,
    locate,
    store_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_TIME = tl.constexpr(1 << 53)

SIZES = ["B", "H", "L", "tiles", "positions", "buckets", "position_stride", "time_stride"]
STRIDES = [f"stride_{name}{axis}" for name in "qkvgr" for axis in "bhl"]


@triton.jit
def _history(targets_ptr, batch, rows, HAS_TARGETS: tl.constexpr):
    """Rows of the sequence before its targets; a number out of range is moved into it."""
    history = rows
    if HAS_TARGETS:
        targets = tl.load(targets_ptr + batch)
        history = rows - tl.minimum(tl.maximum(targets, 0), rows).to(tl.int32)
    return history


@triton.jit
def _bucket(query_times, key_times, edges_ptr, buckets, STEPS: tl.constexpr):
    """How many edges the differences have reached: the largest number, bit by bit."""
    apart = tl.maximum(query_times, key_times) - tl.minimum(query_times, key_times)
    # A difference that int64 can't hold is beyond all edges.
    apart = tl.where((apart < 0) | (apart > MAX_TIME), MAX_TIME, apart)
    bucket = tl.zeros_like(apart).to(tl.int32)
    for step in tl.static_range(STEPS):
        more = bucket + (1 << (STEPS - 1 - step))
        edge = tl.load(edges_ptr + more - 1, mask=more < buckets, other=0x7FFFFFFFFFFFFFFF)
        bucket = tl.where(apart >= edge, more, bucket)
    return bucket


@triton.jit
def _biases(
    i,
    j,
    rows,
    head,
    position_ptr,
    position_stride,
    positions,
    time_ptr,
    time_stride,
    buckets,
    edges_ptr,
    times_ptr,
    query_times_ptr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The bias of i and j, which broadcast to [.., ..], and the entries it comes from."""
    entry = i - j
    bucket = i - j
    bias = tl.zeros_like(entry).to(tl.float32)
    if HAS_POSITION:
        last = positions - 1
        entry = last + tl.minimum(tl.maximum(j - i, -last), last)
        bias += tl.load(position_ptr + head * position_stride + entry)
    if HAS_TIME:
        asked = tl.load(query_times_ptr + i, mask=i < rows, other=0)
        times = tl.load(times_ptr + j, mask=j < rows, other=0)
        bucket = _bucket(asked, times, edges_ptr, buckets, STEPS)
        bias += tl.load(time_ptr + head * time_stride + bucket)
    return bias, entry, bucket


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x), or less than 2^-125 where that is far below; no infinity on the way."""
    return 1.0 / (1.0 + tl.exp2(tl.minimum(-x * LOG2_E, 126.0)))


@triton.jit
def _key_blocks(
    first, rows, history, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Blocks of the history that the tile sees, its first target, blocks of its own targets."""
    end = tl.minimum(history, first + BLOCK_M) if CAUSAL else history
    own = tl.maximum(history, first)
    own_end = tl.minimum(first + BLOCK_M, rows)
    blocks = (tl.maximum(own_end - own, 0) + BLOCK_N - 1) // BLOCK_N
    return (end + BLOCK_N - 1) // BLOCK_N, own, tl.where(first < rows, blocks, 0)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def pointwise_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    bounds_ptr,
    targets_ptr,
    position_ptr,
    time_ptr,
    edges_ptr,
    times_ptr,
    query_times_ptr,
    scale,
    inverse_norm,
    B,
    H,
    L,
    tiles,
    positions,
    buckets,
    position_stride,
    time_stride,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_ql,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kl,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vl,
    stride_rb: tl.int64,
    stride_rh: tl.int64,
    stride_rl,
    CAUSAL: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of the output; strides r of results."""
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_rb, stride_rh, stride_rl = stride_rb * ALIGNED, stride_rh * ALIGNED, stride_rl * ALIGNED
    batch, head, begin, length, rows, first = locate(
        bounds_ptr, B, H, L, tiles, BLOCK_M, JAGGED, HAS_LENGTHS
    )
    if (first < 0) | (first >= length):
        return
    history = _history(targets_ptr, batch, rows, HAS_TARGETS)
    q_base = base_of(q_ptr, batch, head, begin, stride_qb, stride_qh, stride_ql, JAGGED)
    k_base = base_of(k_ptr, batch, head, begin, stride_kb, stride_kh, stride_kl, JAGGED)
    v_base = base_of(v_ptr, batch, head, begin, stride_vb, stride_vh, stride_vl, JAGGED)
    times_at = begin.to(tl.int64) if JAGGED else batch.to(tl.int64) * L
    local, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = first + local
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, stride_ql, first, local, 0, rows, D, BLOCK_D)
    out = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    of_history, own, of_targets = _key_blocks(first, rows, history, CAUSAL, BLOCK_M, BLOCK_N)
    for block in range(of_history + of_targets):
        past = block < of_history
        n = tl.where(past, block * BLOCK_N, own + (block - of_history) * BLOCK_N)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        k = load_rows(k_base, stride_kl, n, column, 0, rows, D, BLOCK_D)
        v = load_rows(v_base, stride_vl, n, column, 0, rows, DV, BLOCK_DV)
        j = n + column
        seen = (j < history)[None, :] & (i < rows)[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None])
        seen = tl.where(past, seen, (j[None, :] == i[:, None]) & (i < rows)[:, None])
        bias, _, _ = _biases(
            *(i[:, None], j[None, :], rows, head, position_ptr, position_stride, positions),
            *(time_ptr, time_stride, buckets, edges_ptr, times_ptr + times_at),
            *(query_times_ptr + times_at, HAS_POSITION, HAS_TIME, STEPS),
        )
        # [BLOCK_M, BLOCK_N]
        scores = dot(q, tl.trans(k), PRECISION, WIDEN) * scale + bias
        weights = tl.where(seen, scores * _sigmoid(scores), 0.0)
        out += dot(rounded(weights, v.dtype, ROUND), v, PRECISION, WIDEN)
    out_base = base_of(out_ptr, batch, head, begin, stride_rb, stride_rh, stride_rl, JAGGED)
    out = rounded(out * inverse_norm, out_ptr.dtype.element_ty, ROUND)
    store_rows(out_base, stride_rl, first, local, length, out, DV, BLOCK_DV)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def pointwise_backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    dq_ptr,
    d_position_ptr,
    d_time_ptr,
    bounds_ptr,
    targets_ptr,
    position_ptr,
    time_ptr,
    edges_ptr,
    times_ptr,
    query_times_ptr,
    scale,
    inverse_norm,
    B,
    H,
    L,
    tiles,
    positions,
    buckets,
    position_stride,
    time_stride,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_ql,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kl,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vl,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gl,
    stride_rb: tl.int64,
    stride_rh: tl.int64,
    stride_rl,
    CAUSAL: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of BLOCK_M queries and their part of the tables' gradients; strides g of d_out."""
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_gb, stride_gh, stride_gl = stride_gb * ALIGNED, stride_gh * ALIGNED, stride_gl * ALIGNED
    stride_rb, stride_rh, stride_rl = stride_rb * ALIGNED, stride_rh * ALIGNED, stride_rl * ALIGNED
    batch, head, begin, length, rows, first = locate(
        bounds_ptr, B, H, L, tiles, BLOCK_M, JAGGED, HAS_LENGTHS
    )
    if (first < 0) | (first >= length):
        return
    history = _history(targets_ptr, batch, rows, HAS_TARGETS)
    q_base = base_of(q_ptr, batch, head, begin, stride_qb, stride_qh, stride_ql, JAGGED)
    k_base = base_of(k_ptr, batch, head, begin, stride_kb, stride_kh, stride_kl, JAGGED)
    v_base = base_of(v_ptr, batch, head, begin, stride_vb, stride_vh, stride_vl, JAGGED)
    g_base = base_of(d_out_ptr, batch, head, begin, stride_gb, stride_gh, stride_gl, JAGGED)
    times_at = begin.to(tl.int64) if JAGGED else batch.to(tl.int64) * L
    local, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = first + local
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    q = load_rows(q_base, stride_ql, first, local, 0, rows, D, BLOCK_D)
    g = load_rows(g_base, stride_gl, first, local, 0, rows, DV, BLOCK_DV)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    of_history, own, of_targets = _key_blocks(first, rows, history, CAUSAL, BLOCK_M, BLOCK_N)
    for block in range(of_history + of_targets):
        past = block < of_history
        n = tl.where(past, block * BLOCK_N, own + (block - of_history) * BLOCK_N)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        k = load_rows(k_base, stride_kl, n, column, 0, rows, D, BLOCK_D)
        v = load_rows(v_base, stride_vl, n, column, 0, rows, DV, BLOCK_DV)
        j = n + column
        seen = (j < history)[None, :] & (i < rows)[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None])
        seen = tl.where(past, seen, (j[None, :] == i[:, None]) & (i < rows)[:, None])
        bias, entry, bucket = _biases(
            *(i[:, None], j[None, :], rows, head, position_ptr, position_stride, positions),
            *(time_ptr, time_stride, buckets, edges_ptr, times_ptr + times_at),
            *(query_times_ptr + times_at, HAS_POSITION, HAS_TIME, STEPS),
        )
        # [BLOCK_M, BLOCK_N]
        scores = dot(q, tl.trans(k), PRECISION, WIDEN) * scale + bias
        s = _sigmoid(scores)
        ds = s * (1.0 + scores * (1.0 - s)) * dot(g, tl.trans(v), PRECISION, WIDEN)
        ds = tl.where(seen, ds * inverse_norm, 0.0)
        if HAS_POSITION:
            at = d_position_ptr + head * (2 * positions - 1) + entry
            tl.atomic_add(at, ds, mask=seen, sem="relaxed")
        if HAS_TIME:
            tl.atomic_add(d_time_ptr + head * buckets + bucket, ds, mask=seen, sem="relaxed")
        dq += dot(rounded(ds, k.dtype, ROUND), k, PRECISION, WIDEN)
    dq_base = base_of(dq_ptr, batch, head, begin, stride_rb, stride_rh, stride_rl, JAGGED)
    dq = rounded(dq * scale, dq_ptr.dtype.element_ty, ROUND)
    store_rows(dq_base, stride_rl, first, local, length, dq, D, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "stride_sb", "stride_sh", "stride_sl"])
def pointwise_backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    dk_ptr,
    dv_ptr,
    bounds_ptr,
    targets_ptr,
    position_ptr,
    time_ptr,
    edges_ptr,
    times_ptr,
    query_times_ptr,
    scale,
    inverse_norm,
    B,
    H,
    L,
    tiles,
    positions,
    buckets,
    position_stride,
    time_stride,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_ql,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kl,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vl,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gl,
    stride_rb: tl.int64,
    stride_rh: tl.int64,
    stride_rl,
    stride_sb: tl.int64,
    stride_sh: tl.int64,
    stride_sl,
    CAUSAL: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of BLOCK_M keys; strides r of dk, s of dv."""
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_gb, stride_gh, stride_gl = stride_gb * ALIGNED, stride_gh * ALIGNED, stride_gl * ALIGNED
    stride_rb, stride_rh, stride_rl = stride_rb * ALIGNED, stride_rh * ALIGNED, stride_rl * ALIGNED
    stride_sb, stride_sh, stride_sl = stride_sb * ALIGNED, stride_sh * ALIGNED, stride_sl * ALIGNED
    batch, head, begin, length, rows, first = locate(
        bounds_ptr, B, H, L, tiles, BLOCK_M, JAGGED, HAS_LENGTHS
    )
    if (first < 0) | (first >= length):
        return
    history = _history(targets_ptr, batch, rows, HAS_TARGETS)
    q_base = base_of(q_ptr, batch, head, begin, stride_qb, stride_qh, stride_ql, JAGGED)
    k_base = base_of(k_ptr, batch, head, begin, stride_kb, stride_kh, stride_kl, JAGGED)
    v_base = base_of(v_ptr, batch, head, begin, stride_vb, stride_vh, stride_vl, JAGGED)
    g_base = base_of(d_out_ptr, batch, head, begin, stride_gb, stride_gh, stride_gl, JAGGED)
    times_at = begin.to(tl.int64) if JAGGED else batch.to(tl.int64) * L
    local, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j = first + local
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    k = load_rows(k_base, stride_kl, first, local, 0, rows, D, BLOCK_D)
    v = load_rows(v_base, stride_vl, first, local, 0, rows, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    # A tile of targets is seen by itself alone.
    last = tl.where(first < history, rows, tl.minimum(rows, first + BLOCK_M))
    start = first if CAUSAL else tl.where(first < history, 0, first)
    for n in range(start, last, BLOCK_N):
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        q = load_rows(q_base, stride_ql, n, column, 0, rows, D, BLOCK_D)
        g = load_rows(g_base, stride_gl, n, column, 0, rows, DV, BLOCK_DV)
        i = n + column
        seen = (j < history)[:, None] & (i < rows)[None, :]
        if CAUSAL:
            seen = seen & (j[:, None] < i[None, :])
        seen = seen | ((j[:, None] == i[None, :]) & (i < rows)[None, :])
        bias, _, _ = _biases(
            *(i[None, :], j[:, None], rows, head, position_ptr, position_stride, positions),
            *(time_ptr, time_stride, buckets, edges_ptr, times_ptr + times_at),
            *(query_times_ptr + times_at, HAS_POSITION, HAS_TIME, STEPS),
        )
        # [BLOCK_M, BLOCK_N]: keys by queries
        scores = dot(k, tl.trans(q), PRECISION, WIDEN) * scale + bias
        s = _sigmoid(scores)
        weights = tl.where(seen, scores * s * inverse_norm, 0.0)
        dv += dot(rounded(weights, g.dtype, ROUND), g, PRECISION, WIDEN)
        ds = s * (1.0 + scores * (1.0 - s)) * dot(v, tl.trans(g), PRECISION, WIDEN)
        ds = tl.where(seen, ds * inverse_norm, 0.0)
        dk += dot(rounded(ds, q.dtype, ROUND), q, PRECISION, WIDEN)
    dk_base = base_of(dk_ptr, batch, head, begin, stride_rb, stride_rh, stride_rl, JAGGED)
    dv_base = base_of(dv_ptr, batch, head, begin, stride_sb, stride_sh, stride_sl, JAGGED)
    dk = rounded(dk * scale, dk_ptr.dtype.element_ty, ROUND)
    store_rows(dk_base, stride_rl, first, local, length, dk, D, BLOCK_D)
    dv = rounded(dv, dv_ptr.dtype.element_ty, ROUND)
    store_rows(dv_base, stride_sl, first, local, length, dv, DV, BLOCK_DV)

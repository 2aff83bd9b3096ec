"""The backward: dq by queries, then dk and dv by keys. Both gather; nothing is added atomically.

With p = exp(s - lse) recomputed, ds = p (d_out v^T - delta), delta = sum(d_out * out) - d_lse:
dq[i] sums ds[i, j] k[j] over the keys that i sees; dk[j] sums ds[i, j] q[i] and dv[j] sums
p[i, j] d_out[i] over the queries that see j, which are those at the same distances. So both are
the forward's loops, and each sum is made by one program in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrec.kernels._triton import rounded
from fastrec.kernels.window_sparse_attention._triton.tiles import (
    base_of,
    dot,
    far_range,
    load_lse,
    load_numbers,
    load_rows,
    locate,
    store_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)

NUMBERS = [
    *("B", "H", "L", "tiles", "window"),
    *("stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl"),
    *("stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh", "stride_ol"),
    *("stride_gb", "stride_gh", "stride_gl", "stride_rb", "stride_rh", "stride_rl"),
    *("stride_eb", "stride_eh", "stride_el"),
]


@triton.jit
def _far_of_queries(
    dq,
    q_wide,
    g_wide,
    lse,
    delta,
    k_base,
    stride_kl,
    v_base,
    stride_vl,
    first,
    local,
    keys,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq with what the keys ``first + local`` add to the queries of the tile."""
    # [BLOCK_M, BLOCK_D]
    k = load_rows(k_base, stride_kl, first, local, 0, keys, D, BLOCK_D).to(tl.float32)
    v = load_rows(v_base, stride_vl, first, local, 0, keys, D, BLOCK_D).to(tl.float32)
    j = first + local
    scores = tl.sum(q_wide * k, axis=1) * scale_log2
    scores = tl.where((j >= 0) & (j < keys), scores, float("-inf"))
    ds = tl.exp2(scores - lse) * (tl.sum(g_wide * v, axis=1) - delta)
    return dq + ds[:, None] * k


@triton.jit(do_not_specialize=NUMBERS)
def attention_backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    d_lse_ptr,
    delta_ptr,
    dq_ptr,
    bounds_ptr,
    far_ptr,
    far_starts_ptr,
    scale,
    B,
    H,
    L,
    tiles,
    window,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_ql,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kl,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vl,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_ol,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gl,
    stride_rb: tl.int64,
    stride_rh: tl.int64,
    stride_rl,
    stride_eb: tl.int64,
    stride_eh: tl.int64,
    stride_el,
    CAUSAL: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAR_STAGES: tl.constexpr,
):
    """dq and delta of BLOCK_M queries; strides g of d_out, r of results, e of numbers a row."""
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_ob, stride_oh, stride_ol = stride_ob * ALIGNED, stride_oh * ALIGNED, stride_ol * ALIGNED
    stride_gb, stride_gh, stride_gl = stride_gb * ALIGNED, stride_gh * ALIGNED, stride_gl * ALIGNED
    stride_rb, stride_rh, stride_rl = stride_rb * ALIGNED, stride_rh * ALIGNED, stride_rl * ALIGNED
    batch, head, begin, rows, keys, first = locate(
        bounds_ptr, B, H, L, tiles, BLOCK_M, JAGGED, HAS_LENGTHS
    )
    if (first < 0) | (first >= rows):
        return
    q_base = base_of(q_ptr, batch, head, begin, stride_qb, stride_qh, stride_ql, JAGGED)
    k_base = base_of(k_ptr, batch, head, begin, stride_kb, stride_kh, stride_kl, JAGGED)
    v_base = base_of(v_ptr, batch, head, begin, stride_vb, stride_vh, stride_vl, JAGGED)
    out_base = base_of(out_ptr, batch, head, begin, stride_ob, stride_oh, stride_ol, JAGGED)
    g_base = base_of(d_out_ptr, batch, head, begin, stride_gb, stride_gh, stride_gl, JAGGED)
    lse_base = base_of(lse_ptr, batch, head, begin, stride_eb, stride_eh, stride_el, JAGGED)
    delta_base = base_of(delta_ptr, batch, head, begin, stride_eb, stride_eh, stride_el, JAGGED)
    local = tl.arange(0, BLOCK_M)
    i = first + local
    scale_log2 = scale * LOG2_E
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, stride_ql, first, local, 0, rows, D, BLOCK_D)
    g = load_rows(g_base, stride_gl, first, local, 0, rows, D, BLOCK_D)
    out = load_rows(out_base, stride_ol, first, local, 0, rows, D, BLOCK_D)
    # [BLOCK_M]
    q_wide, g_wide = q.to(tl.float32), g.to(tl.float32)
    delta = tl.sum(g_wide * out.to(tl.float32), axis=1)
    if HAS_D_LSE:
        d_lse_base = base_of(d_lse_ptr, batch, head, begin, stride_eb, stride_eh, stride_el, JAGGED)
        delta -= load_numbers(d_lse_base, stride_el, first, local, rows)
    tl.store(delta_base + i.to(tl.int64) * stride_el, delta, mask=i < rows)
    lse = load_lse(lse_base, stride_el, first, local, rows)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    far_begin, far_end = far_range(
        far_ptr, far_starts_ptr, head, tl.maximum(first + BLOCK_M, keys - first), BLOCK_F
    )
    for n in tl.range(far_begin, far_end, num_stages=FAR_STAGES):
        distance = tl.load(far_ptr + n)
        dq = _far_of_queries(
            *(dq, q_wide, g_wide, lse, delta, k_base, stride_kl, v_base, stride_vl),
            *(first - distance, local, keys, scale_log2, D, BLOCK_D),
        )
        if not CAUSAL:
            dq = _far_of_queries(
                *(dq, q_wide, g_wide, lse, delta, k_base, stride_kl, v_base, stride_vl),
                *(first + distance, local, keys, scale_log2, D, BLOCK_D),
            )

    column = tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_M + (0 if CAUSAL else window), keys)
    for n in range(tl.maximum(first - window, 0), last, BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_base, stride_kl, n, column, 0, keys, D, BLOCK_D)
        v = load_rows(v_base, stride_vl, n, column, 0, keys, D, BLOCK_D)
        j = n + column
        steps = i[:, None] - j[None, :]
        seen = (steps <= window) & (j < keys)[None, :]
        seen = seen & (steps >= (0 if CAUSAL else -window))
        # [BLOCK_M, BLOCK_N]
        scores = dot(q, tl.trans(k), PRECISION, WIDEN) * scale_log2
        p = tl.exp2(tl.where(seen, scores, float("-inf")) - lse[:, None])
        ds = p * (dot(g, tl.trans(v), PRECISION, WIDEN) - delta[:, None])
        dq += dot(rounded(ds, k.dtype, ROUND), k, PRECISION, WIDEN)

    dq_base = base_of(dq_ptr, batch, head, begin, stride_rb, stride_rh, stride_rl, JAGGED)
    dq = rounded(dq * scale, dq_ptr.dtype.element_ty, ROUND)
    store_rows(dq_base, stride_rl, first, local, rows, dq, D, BLOCK_D)


@triton.jit
def _far_of_keys(
    dk,
    dv,
    k_wide,
    v_wide,
    q_base,
    stride_ql,
    g_base,
    stride_gl,
    lse_base,
    delta_base,
    stride_el,
    first,
    local,
    rows,
    seen,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv with what the queries ``first + local`` add to the keys of the tile."""
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, stride_ql, first, local, 0, rows, D, BLOCK_D).to(tl.float32)
    g = load_rows(g_base, stride_gl, first, local, 0, rows, D, BLOCK_D).to(tl.float32)
    # [BLOCK_M]
    lse = load_lse(lse_base, stride_el, first, local, rows)
    delta = load_numbers(delta_base, stride_el, first, local, rows)
    i = first + local
    seen = seen & (i >= 0) & (i < rows)
    scores = tl.sum(q * k_wide, axis=1) * scale_log2
    p = tl.exp2(tl.where(seen, scores, float("-inf")) - lse)
    ds = p * (tl.sum(g * v_wide, axis=1) - delta)
    return dk + ds[:, None] * q, dv + p[:, None] * g


@triton.jit(do_not_specialize=NUMBERS)
def attention_backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    bounds_ptr,
    far_ptr,
    far_starts_ptr,
    scale,
    B,
    H,
    L,
    tiles,
    window,
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
    stride_eb: tl.int64,
    stride_eh: tl.int64,
    stride_el,
    CAUSAL: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAR_STAGES: tl.constexpr,
):
    """dk and dv of BLOCK_M keys; zeros where a key is not valid."""
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_gb, stride_gh, stride_gl = stride_gb * ALIGNED, stride_gh * ALIGNED, stride_gl * ALIGNED
    stride_rb, stride_rh, stride_rl = stride_rb * ALIGNED, stride_rh * ALIGNED, stride_rl * ALIGNED
    batch, head, begin, rows, keys, first = locate(
        bounds_ptr, B, H, L, tiles, BLOCK_M, JAGGED, HAS_LENGTHS
    )
    if (first < 0) | (first >= rows):
        return
    q_base = base_of(q_ptr, batch, head, begin, stride_qb, stride_qh, stride_ql, JAGGED)
    k_base = base_of(k_ptr, batch, head, begin, stride_kb, stride_kh, stride_kl, JAGGED)
    v_base = base_of(v_ptr, batch, head, begin, stride_vb, stride_vh, stride_vl, JAGGED)
    g_base = base_of(d_out_ptr, batch, head, begin, stride_gb, stride_gh, stride_gl, JAGGED)
    lse_base = base_of(lse_ptr, batch, head, begin, stride_eb, stride_eh, stride_el, JAGGED)
    delta_base = base_of(delta_ptr, batch, head, begin, stride_eb, stride_eh, stride_el, JAGGED)
    local = tl.arange(0, BLOCK_M)
    j = first + local
    valid = j < keys
    scale_log2 = scale * LOG2_E
    # [BLOCK_M, BLOCK_D]
    k = load_rows(k_base, stride_kl, first, local, 0, keys, D, BLOCK_D)
    v = load_rows(v_base, stride_vl, first, local, 0, keys, D, BLOCK_D)
    k_wide, v_wide = k.to(tl.float32), v.to(tl.float32)
    dk = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    # No query sees a tile without a valid key.
    last_row = tl.where(first < keys, rows, 0)
    far_begin, far_end = far_range(
        far_ptr, far_starts_ptr, head, tl.maximum(first + BLOCK_M, last_row - first), BLOCK_F
    )
    far_end = tl.where(first < keys, far_end, far_begin)
    for n in tl.range(far_begin, far_end, num_stages=FAR_STAGES):
        distance = tl.load(far_ptr + n)
        dk, dv = _far_of_keys(
            *(dk, dv, k_wide, v_wide, q_base, stride_ql, g_base, stride_gl),
            *(lse_base, delta_base, stride_el, first + distance, local, rows, valid),
            *(scale_log2, D, BLOCK_D),
        )
        if not CAUSAL:
            dk, dv = _far_of_keys(
                *(dk, dv, k_wide, v_wide, q_base, stride_ql, g_base, stride_gl),
                *(lse_base, delta_base, stride_el, first - distance, local, rows, valid),
                *(scale_log2, D, BLOCK_D),
            )

    column = tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_M + window, last_row)
    for n in range(tl.maximum(first - (0 if CAUSAL else window), 0), last, BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        q = load_rows(q_base, stride_ql, n, column, 0, rows, D, BLOCK_D)
        g = load_rows(g_base, stride_gl, n, column, 0, rows, D, BLOCK_D)
        # [BLOCK_N]
        lse = load_lse(lse_base, stride_el, n, column, rows)
        delta = load_numbers(delta_base, stride_el, n, column, rows)
        i = n + column
        steps = i[None, :] - j[:, None]
        seen = (steps <= window) & valid[:, None] & (i < rows)[None, :]
        seen = seen & (steps >= (0 if CAUSAL else -window))
        # [BLOCK_M, BLOCK_N]: keys by queries
        scores = dot(k, tl.trans(q), PRECISION, WIDEN) * scale_log2
        p = tl.exp2(tl.where(seen, scores, float("-inf")) - lse[None, :])
        dv += dot(rounded(p, g.dtype, ROUND), g, PRECISION, WIDEN)
        ds = p * (dot(v, tl.trans(g), PRECISION, WIDEN) - delta[None, :])
        dk += dot(rounded(ds, q.dtype, ROUND), q, PRECISION, WIDEN)

    dk_base = base_of(dk_ptr, batch, head, begin, stride_rb, stride_rh, stride_rl, JAGGED)
    dv_base = base_of(dv_ptr, batch, head, begin, stride_rb, stride_rh, stride_rl, JAGGED)
    dk = rounded(dk * scale, dk_ptr.dtype.element_ty, ROUND)
    store_rows(dk_base, stride_rl, first, local, rows, dk, D, BLOCK_D)
    dv = rounded(dv, dv_ptr.dtype.element_ty, ROUND)
    store_rows(dv_base, stride_rl, first, local, rows, dv, D, BLOCK_D)

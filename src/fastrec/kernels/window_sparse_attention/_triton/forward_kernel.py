"""The forward: the window on matrix units, far positions as shifted rows, one softmax over both.

A tile of queries meets the keys around it in blocks (two ``tl.dot``). Far positions at distance d
are the same rows shifted by d: one contiguous tile of keys and one of values, multiplied with the
queries element by element; nothing is gathered.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrec.kernels._triton import rounded
from fastrec.kernels.window_sparse_attention._triton.tiles import (
    base_of,
    dot,
    far_range,
    load_rows,
    locate,
    store_rows,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _raised(m, scores_max):
    """The new maximum, what exponents take for it (0 in a row of none), the old one's factor."""
    raised = tl.maximum(m, scores_max)
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, finite, tl.exp2(m - finite)


@triton.jit(
    do_not_specialize=[
        *("B", "H", "L", "tiles", "window"),
        *("stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl"),
        *("stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh", "stride_ol"),
        *("stride_eb", "stride_eh", "stride_el"),
    ]
)
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bounds_ptr,
    far_ptr,
    far_starts_ptr,
    scale_log2,
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
    stride_eb: tl.int64,
    stride_eh: tl.int64,
    stride_el,
    CAUSAL: tl.constexpr,
    JAGGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    WITH_LSE: tl.constexpr,
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
    """One tile of BLOCK_M queries. ``scale_log2``: the scores' factor times log2 e."""
    # Divided by it on the way here: a product's divisor is what the compiler knows for sure.
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_ob, stride_oh, stride_ol = stride_ob * ALIGNED, stride_oh * ALIGNED, stride_ol * ALIGNED
    batch, head, begin, rows, keys, first = locate(
        bounds_ptr, B, H, L, tiles, BLOCK_M, JAGGED, HAS_LENGTHS
    )
    if (first < 0) | (first >= rows):
        return
    q_base = base_of(q_ptr, batch, head, begin, stride_qb, stride_qh, stride_ql, JAGGED)
    k_base = base_of(k_ptr, batch, head, begin, stride_kb, stride_kh, stride_kl, JAGGED)
    v_base = base_of(v_ptr, batch, head, begin, stride_vb, stride_vh, stride_vl, JAGGED)
    local = tl.arange(0, BLOCK_M)
    i = first + local
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_base, stride_ql, first, local, 0, rows, D, BLOCK_D)

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    # Far positions; past the last key or before the first, loads are masked off.
    far_begin, far_end = far_range(
        far_ptr, far_starts_ptr, head, tl.maximum(first + BLOCK_M, keys - first), BLOCK_F
    )
    q_wide = q.to(tl.float32)
    for n in tl.range(far_begin, far_end, num_stages=FAR_STAGES):
        distance = tl.load(far_ptr + n)
        # [BLOCK_M, BLOCK_D]
        k_back = load_rows(k_base, stride_kl, first - distance, local, 0, keys, D, BLOCK_D)
        v_back = load_rows(v_base, stride_vl, first - distance, local, 0, keys, D, BLOCK_D)
        back = tl.sum(q_wide * k_back.to(tl.float32), axis=1) * scale_log2
        seen = (i >= distance) & (i - distance < keys)
        back = tl.where(seen, back, float("-inf"))
        if CAUSAL:
            m, finite, alpha = _raised(m, back)
            p_back = tl.exp2(back - finite)
            total = total * alpha + p_back
            acc = acc * alpha[:, None] + p_back[:, None] * v_back.to(tl.float32)
        else:
            k_ahead = load_rows(k_base, stride_kl, first + distance, local, 0, keys, D, BLOCK_D)
            v_ahead = load_rows(v_base, stride_vl, first + distance, local, 0, keys, D, BLOCK_D)
            ahead = tl.sum(q_wide * k_ahead.to(tl.float32), axis=1) * scale_log2
            ahead = tl.where(i + distance < keys, ahead, float("-inf"))
            m, finite, alpha = _raised(m, tl.maximum(back, ahead))
            p_back = tl.exp2(back - finite)
            p_ahead = tl.exp2(ahead - finite)
            total = total * alpha + p_back + p_ahead
            acc = acc * alpha[:, None] + p_back[:, None] * v_back.to(tl.float32)
            acc += p_ahead[:, None] * v_ahead.to(tl.float32)

    column = tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_M + (0 if CAUSAL else window), keys)
    for n in range(tl.maximum(first - window, 0), last, BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_base, stride_kl, n, column, 0, keys, D, BLOCK_D)
        v = load_rows(v_base, stride_vl, n, column, 0, keys, D, BLOCK_D)
        scores = dot(q, tl.trans(k), PRECISION, WIDEN)
        j = n + column
        steps = i[:, None] - j[None, :]
        seen = (steps <= window) & (j < keys)[None, :]
        seen = seen & (steps >= (0 if CAUSAL else -window))
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        m, finite, alpha = _raised(m, tl.max(scores, axis=1))
        p = tl.exp2(scores - finite[:, None])
        total = total * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None] + dot(rounded(p, v.dtype, ROUND), v, PRECISION, WIDEN)

    # A row that saw no key: nothing by 1 is 0, and its log-sum-exp is -inf.
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    acc = acc / total[:, None]
    out_base = base_of(out_ptr, batch, head, begin, stride_ob, stride_oh, stride_ol, JAGGED)
    out = rounded(acc, out_ptr.dtype.element_ty, ROUND)
    store_rows(out_base, stride_ol, first, local, rows, out, D, BLOCK_D)
    if WITH_LSE:
        lse = tl.where(none, float("-inf"), (m + tl.log2(total)) * LN2)
        lse_base = base_of(lse_ptr, batch, head, begin, stride_eb, stride_eh, stride_el, JAGGED)
        tl.store(lse_base + i.to(tl.int64) * stride_el, lse, mask=i < rows)

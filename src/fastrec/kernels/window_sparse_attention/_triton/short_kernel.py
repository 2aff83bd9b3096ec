"""Short sequences: one program for each user and head, all keys at once, no online softmax.

Up to 256 keys a dense product on matrix units costs less than to walk through distances. What a
query sees at distance j - i is looked up in one table, window, far positions and causality alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrec.kernels._triton import rounded
from fastrec.kernels.window_sparse_attention._triton.tiles import (
    base_of,
    dot,
    load_rows,
    store_rows,
)

LN2 = tl.constexpr(0.6931471805599453)
# Steps from -256 to 255.
STEPS = tl.constexpr(512)


@triton.jit
def attend(
    q,
    k,
    v,
    i,
    j,
    keys,
    seen_ptr,
    scale_log2,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """softmax(q k^T) v of queries i over all keys j, and its base 2 log-sum-exp.

    ``seen_ptr``: of one head, a byte for each step j - i from -256 on.
    """
    # [BLOCK_M, BLOCK_N]
    scores = dot(q, tl.trans(k), PRECISION, WIDEN) * scale_log2
    seen = tl.load(seen_ptr + (j[None, :] - i[:, None]) + STEPS // 2) != 0
    scores = tl.where(seen & (j < keys)[None, :], scores, float("-inf"))
    m = tl.max(scores, axis=1)
    none = m == float("-inf")
    p = tl.exp2(scores - tl.where(none, 0.0, m)[:, None])
    # A row that sees no key: nothing by 1 is 0.
    total = tl.where(none, 1.0, tl.sum(p, axis=1))
    out = dot(rounded(p, v.dtype, ROUND), v, PRECISION, WIDEN) / total[:, None]
    return out, m + tl.log2(total)


@triton.jit(
    do_not_specialize=[
        *("H", "L"),
        *("stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl"),
        *("stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh", "stride_ol"),
    ]
)
def attention_short_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lengths_ptr,
    seen_ptr,
    scale_log2,
    H,
    L,
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
):
    """One head of one user, BLOCK_M queries at a time; BLOCK_N >= L."""
    stride_qb, stride_qh, stride_ql = stride_qb * ALIGNED, stride_qh * ALIGNED, stride_ql * ALIGNED
    stride_kb, stride_kh, stride_kl = stride_kb * ALIGNED, stride_kh * ALIGNED, stride_kl * ALIGNED
    stride_vb, stride_vh, stride_vl = stride_vb * ALIGNED, stride_vh * ALIGNED, stride_vl * ALIGNED
    stride_ob, stride_oh, stride_ol = stride_ob * ALIGNED, stride_oh * ALIGNED, stride_ol * ALIGNED
    program = tl.program_id(0)
    head, batch = program % H, program // H
    keys = L
    if HAS_LENGTHS:
        keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), L).to(tl.int32)
    q_base = base_of(q_ptr, batch, head, 0, stride_qb, stride_qh, stride_ql, False)
    k_base = base_of(k_ptr, batch, head, 0, stride_kb, stride_kh, stride_kl, False)
    v_base = base_of(v_ptr, batch, head, 0, stride_vb, stride_vh, stride_vl, False)
    out_base = base_of(out_ptr, batch, head, 0, stride_ob, stride_oh, stride_ol, False)
    j = tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D]
    k = load_rows(k_base, stride_kl, 0, j, 0, keys, D, BLOCK_D)
    v = load_rows(v_base, stride_vl, 0, j, 0, keys, D, BLOCK_D)
    local = tl.arange(0, BLOCK_M)
    for first in range(0, L, BLOCK_M):
        i = first + local
        q = load_rows(q_base, stride_ql, first, local, 0, L, D, BLOCK_D)
        out, lse = attend(
            q, k, v, i, j, keys, seen_ptr + head * STEPS, scale_log2, PRECISION, WIDEN, ROUND
        )
        out = rounded(out, out_ptr.dtype.element_ty, ROUND)
        store_rows(out_base, stride_ol, first, local, L, out, D, BLOCK_D)
        if WITH_LSE:
            tl.store(lse_ptr + program.to(tl.int64) * L + i, lse * LN2, mask=i < L)

"""The attention block of short sequences in one launch: projections in, attention, projection out.

    y = concat_h(attention(x Wq_h^T + bq_h, x Wk_h^T + bk_h, x Wv_h^T + bv_h)) Wo^T + bo

A program has 32 rows of one user. x stays with it, heads follow one another, their weights
are streamed from L2, and each head's result meets its columns of Wo at once: neither q, k and v nor
the heads' results are ever written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrec.kernels._triton import rounded
from fastrec.kernels.window_sparse_attention._triton.short_kernel import STEPS, attend
from fastrec.kernels.window_sparse_attention._triton.tiles import dot, load_rows, store_rows


@triton.jit
def _projected(
    x,
    weight_ptr,
    bias_ptr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """x [.., E] times the transpose of D rows of a weight, in x's dtype."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    # [BLOCK_E, BLOCK_D]
    weight = tl.load(
        weight_ptr + d[None, :] * E + e[:, None],
        mask=(d < D)[None, :] & (e < E)[:, None],
        other=0.0,
    )
    result = dot(x, weight, PRECISION, WIDEN)
    if HAS_BIAS:
        # [BLOCK_D]
        result += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return rounded(result, x.dtype, ROUND)


@triton.jit(do_not_specialize=["L", "tiles", "stride_xb", "stride_xl"])
def attention_block(
    x_ptr,
    in_weight_ptr,
    in_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    y_ptr,
    lengths_ptr,
    seen_ptr,
    scale_log2,
    L,
    tiles,
    stride_xb: tl.int64,
    stride_xl,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of one user, all its heads; BLOCK_N >= L, E = H * D."""
    E: tl.constexpr = H * D
    stride_xb, stride_xl = stride_xb * ALIGNED, stride_xl * ALIGNED
    program = tl.program_id(0)
    first, batch = program % tiles * BLOCK_M, program // tiles
    keys = L
    if HAS_LENGTHS:
        keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), L).to(tl.int32)
    x_base = x_ptr + batch.to(tl.int64) * stride_xb
    local, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = first + local
    # Keys beyond the length are not read; queries there are rows like any other.
    # [BLOCK_N, BLOCK_E], [BLOCK_M, BLOCK_E]
    x_keys = load_rows(x_base, stride_xl, 0, j, 0, keys, E, BLOCK_E)
    x_rows = load_rows(x_base, stride_xl, first, local, 0, L, E, BLOCK_E)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    y = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for head in range(H):
        at = head * D
        q = _projected(
            *(x_rows, in_weight_ptr + at * E, in_bias_ptr + at),
            *(E, BLOCK_E, D, BLOCK_D, HAS_BIAS, PRECISION, WIDEN, ROUND),
        )
        k = _projected(
            *(x_keys, in_weight_ptr + (E + at) * E, in_bias_ptr + E + at),
            *(E, BLOCK_E, D, BLOCK_D, HAS_BIAS, PRECISION, WIDEN, ROUND),
        )
        v = _projected(
            *(x_keys, in_weight_ptr + (2 * E + at) * E, in_bias_ptr + 2 * E + at),
            *(E, BLOCK_E, D, BLOCK_D, HAS_BIAS, PRECISION, WIDEN, ROUND),
        )
        seen = seen_ptr + head * STEPS
        out, _ = attend(q, k, v, i, j, keys, seen, scale_log2, PRECISION, WIDEN, ROUND)
        # [BLOCK_D, BLOCK_E]: this head's columns of the output's weight
        weight = tl.load(
            out_weight_ptr + e[None, :] * E + (at + d)[:, None],
            mask=(d < D)[:, None] & (e < E)[None, :],
            other=0.0,
        )
        y += dot(rounded(out, x_rows.dtype, ROUND), weight, PRECISION, WIDEN)
    if HAS_BIAS:
        y += tl.load(out_bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    y_base = y_ptr + batch.to(tl.int64) * L * E
    stride = tl.full([], E, tl.int32)
    store_rows(
        y_base, stride, first, local, L, rounded(y, y_ptr.dtype.element_ty, ROUND), E, BLOCK_E
    )

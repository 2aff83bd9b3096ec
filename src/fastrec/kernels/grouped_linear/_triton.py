"""``grouped_linear`` in Triton: one strided, grouped GEMM serves the forward and both gradients.

M rows, G groups, O outputs and I inputs a group. The kernel computes, for every group g,

    C[r, g, n] = bias[g, n] + sum_k A[r, g, k] * B[k, g, n]

    y  = x w^T      r, n, k = M, O, I
    dx = dy w       r, n, k = M, I, O
    dw = dy^T x     r, n, k = O, I, M; the bias' gradient is the sum of A's rows, taken on the way

Products are accumulated in float32. Long sums (dw) are split into slices whose number depends on
the shape alone; a second kernel adds them in order, so gradients are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastrec.kernels._gpu import ceil_div, device_of, fp32_precision
from fastrec.kernels._triton import INTERPRETED, rounded
from fastrec.kernels.grouped_linear._config import LaunchConfig, heuristic

# (stride of rows or terms, of groups, of terms or columns)
Strides = tuple[int, int, int]

SUM_BLOCK = 512


# R or K is the number of rows of a call, whose divisibility would ask for another kernel.
@triton.jit(do_not_specialize=["R", "K"])
def grouped_gemm(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    sums_ptr,
    R,
    N,
    K,
    G,
    stride_ar,
    stride_ag,
    stride_ak,
    stride_bk,
    stride_bg,
    stride_bn,
    stride_cr,
    stride_cg,
    stride_cn,
    slice_terms,
    slice_stride,
    HAS_BIAS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED_R: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_R, BLOCK_N] of one group, of one slice of the sum.

    ALIGNED_R and ALIGNED_K promise multiples of 16, without which masked loads are not vectors.
    """
    if ALIGNED_R:
        R = tl.multiple_of(R, 16)
    tiles_r, tiles_n = tl.cdiv(R, BLOCK_R), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    tile_r = program % tiles_r
    tile_n = (program // tiles_r) % tiles_n
    group = (program // tiles_r // tiles_n) % G
    part = program // tiles_r // tiles_n // G

    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first = part.to(tl.int64) * slice_terms
    terms = tl.minimum(K - first, slice_terms).to(tl.int32)
    if ALIGNED_K:
        terms = tl.multiple_of(terms, 16)
    # Rows times strides may exceed 32 bits.
    a_rows = a_ptr + group.to(tl.int64) * stride_ag + r.to(tl.int64)[:, None] * stride_ar
    b_cols = b_ptr + group.to(tl.int64) * stride_bg + n.to(tl.int64)[None, :] * stride_bn

    total = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    row_sums = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(0, terms, BLOCK_K):
        inside = start + k < terms
        at = first + start + k
        # [BLOCK_R, BLOCK_K]
        a = tl.load(
            a_rows + at[None, :] * stride_ak, mask=(r < R)[:, None] & inside[None, :], other=0.0
        )
        # [BLOCK_K, BLOCK_N]
        b = tl.load(
            b_cols + at[:, None] * stride_bk, mask=inside[:, None] & (n < N)[None, :], other=0.0
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if SUM_ROWS:
            row_sums += tl.sum(a.to(tl.float32), axis=1)
    if HAS_BIAS:
        # [BLOCK_N]
        bias = tl.load(bias_ptr + group * N + n, mask=n < N, other=0.0)
        total += bias.to(tl.float32)[None, :]
    # A slice's stride is that of both its results: C [G, R, N] and the sums [G, R].
    c = c_ptr + part.to(tl.int64) * slice_stride + group.to(tl.int64) * stride_cg
    c = c + r.to(tl.int64)[:, None] * stride_cr + n.to(tl.int64)[None, :] * stride_cn
    tl.store(
        c, rounded(total, c_ptr.dtype.element_ty, ROUND), mask=(r < R)[:, None] & (n < N)[None, :]
    )
    if SUM_ROWS and tile_n == 0:
        sums = sums_ptr + part.to(tl.int64) * slice_stride + group * R + r
        tl.store(sums, rounded(row_sums, sums_ptr.dtype.element_ty, ROUND), mask=r < R)


@triton.jit
def sum_slices(
    parts_ptr, out_ptr, size, slices, slice_stride, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    """out[n] = the sum of parts[s, n] over s, one after the other."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    at = parts_ptr + n
    for _ in range(slices):
        # [BLOCK]
        total += tl.load(at, mask=n < size, other=0.0)
        at += slice_stride
    tl.store(out_ptr + n, rounded(total, out_ptr.dtype.element_ty, ROUND), mask=n < size)


def _launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    c: torch.Tensor,
    sums: torch.Tensor | None,
    sizes: tuple[int, int, int, int],
    strides: tuple[Strides, Strides, Strides],
    config: LaunchConfig,
    slice_terms: int,
    slice_stride: int,
) -> None:
    """``sizes``: (R, N, K, G)."""
    rows, cols, terms, groups = sizes
    tiles = ceil_div(rows, config.block_rows) * ceil_div(cols, config.block_cols)
    grouped_gemm[(tiles * groups * config.slices,)](
        a,
        b,
        a if bias is None else bias,
        c,
        c if sums is None else sums,
        *sizes,
        *strides[0],
        *strides[1],
        *strides[2],
        slice_terms,
        slice_stride,
        HAS_BIAS=bias is not None,
        SUM_ROWS=sums is not None,
        PRECISION=fp32_precision() if a.dtype is torch.float32 else "ieee",
        WIDEN=INTERPRETED and a.dtype is torch.bfloat16,
        ROUND=INTERPRETED and c.dtype is torch.bfloat16,
        ALIGNED_R=strides[0][0] == 1 and rows % 16 == 0,
        ALIGNED_K=strides[0][2] == 1 and terms % 16 == 0,
        BLOCK_R=config.block_rows,
        BLOCK_N=config.block_cols,
        BLOCK_K=config.block_terms,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _channels(row: int, groups: int, width: int, shuffle: bool) -> Strides:
    """Strides of (row, group, channel of the group) of rows of G * width channels."""
    return (row, 1, groups) if shuffle else (row, width, 1)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    shuffle: bool,
) -> None:
    """x [M, G * I] with contiguous channels, weight [G, O, I] contiguous -> y [M, G * O]."""
    groups, outputs, inputs = weight.shape
    rows = x.shape[0]
    if rows == 0:
        return
    with device_of(x):
        _launch(
            x,
            weight,
            bias,
            y,
            None,
            (rows, outputs, inputs, groups),
            (
                (x.stride(0), inputs, 1),
                (1, outputs * inputs, inputs),
                _channels(groups * outputs, groups, outputs, shuffle),
            ),
            heuristic(rows, outputs, inputs, groups, x.element_size()),
            inputs,
            0,
        )


def backward_x(dy: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, shuffle: bool) -> None:
    """dy [M, G * O], weight [G, O, I] -> dx [M, G * I], contiguous."""
    groups, outputs, inputs = weight.shape
    rows = dy.shape[0]
    if rows == 0:
        return
    with device_of(dy):
        _launch(
            dy,
            weight,
            None,
            dx,
            None,
            (rows, inputs, outputs, groups),
            (
                _channels(dy.stride(0), groups, outputs, shuffle),
                (inputs, outputs * inputs, 1),
                (groups * inputs, inputs, 1),
            ),
            heuristic(rows, inputs, outputs, groups, dy.element_size()),
            outputs,
            0,
        )


def backward_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor | None,
    shuffle: bool,
) -> None:
    """dy [M, G * O], x [M, G * I] -> dweight [G, O, I] and dbias [G * O]."""
    groups, outputs, inputs = dweight.shape
    rows = dy.shape[0]
    if rows == 0:
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        return
    config = heuristic(outputs, inputs, rows, groups, dy.element_size(), sliced=True)
    slice_terms = ceil_div(ceil_div(rows, config.slices), config.block_terms) * config.block_terms
    size, sums_size = dweight.numel(), groups * outputs
    c: Any = dweight
    sums, slice_stride = dbias, 0
    if config.slices > 1:
        slice_stride = size + sums_size
        parts = torch.empty(config.slices * slice_stride, dtype=torch.float32, device=dy.device)
        c, sums = parts, None if dbias is None else parts[size:]
    row, group, channel = _channels(dy.stride(0), groups, outputs, shuffle)
    with device_of(dy):
        _launch(
            dy,
            x,
            None,
            c,
            sums,
            (outputs, inputs, rows, groups),
            (
                (channel, group, row),
                (x.stride(0), inputs, 1),
                (inputs, outputs * inputs, 1),
            ),
            config,
            slice_terms,
            slice_stride,
        )
        if config.slices == 1:
            return
        for source, target in ((parts, dweight), (parts[size:], dbias)):
            if target is not None:
                blocks = (ceil_div(target.numel(), SUM_BLOCK),)
                sum_slices[blocks](
                    source,
                    target,
                    target.numel(),
                    config.slices,
                    slice_stride,
                    ROUND=INTERPRETED and target.dtype is torch.bfloat16,
                    BLOCK=SUM_BLOCK,
                )

"""``separable_projection`` in Triton: the convolution's rows meet the projection in registers.

B sequences of L rows, C = G * I channels, W taps, O outputs a group. Forward: a tile of convolved
rows is made from W shifted, contiguous tiles of x and multiplied at once; hidden rows are never
written. Backward, with the GEMM of ``grouped_linear``:

    dh = dy pointwise               dx = dh convolved with the taps reversed
    dpointwise = dy^T h, dbias      ddepthwise[c, j] = sum_l dh[l, c] x[l + j - before, c]

Long sums are split into slices whose number depends on the shape alone and added in order: the
same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastrec.kernels._gpu import ceil_div, device_of, fp32_precision, power_of_two
from fastrec.kernels._triton import INTERPRETED, rounded
from fastrec.kernels.grouped_linear import _triton as grouped
from fastrec.kernels.separable_projection._config import LaunchConfig, heuristic, row_slices

CONVOLVED_ROWS, CONVOLVED_CHANNELS = 32, 64


@triton.jit
def _valid_rows(lengths_ptr, batch, L, HAS_LENGTHS: tl.constexpr):
    """How many rows of a sequence count."""
    valid = L
    if HAS_LENGTHS:
        valid = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), L).to(tl.int32)
    return valid


@triton.jit
def _convolved(
    x_base,
    stride_l,
    taps_ptr,
    first,
    local,
    c,
    inside,
    valid,
    before,
    W: tl.constexpr,
    FLIP: tl.constexpr,
):
    """sum_j taps[c, j] x[first + local + j - before, c] in float32, [BLOCK_L, BLOCK_C]."""
    sums = tl.zeros([local.shape[0], c.shape[0]], dtype=tl.float32)
    for j in range(W):
        at = first + local + j - before
        # [BLOCK_L, BLOCK_C]
        x = tl.load(
            x_base + stride_l.to(tl.int64) * first + (local + j - before)[:, None] * stride_l + c,
            mask=((at >= 0) & (at < valid))[:, None] & inside[None, :],
            other=0.0,
        )
        # [BLOCK_C]
        tap = tl.load(taps_ptr + c * W + (W - 1 - j if FLIP else j), mask=inside, other=0.0)
        sums += tap.to(tl.float32)[None, :] * x.to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["L", "before", "tiles_l", "stride_xb", "stride_xl"])
def separable_forward(
    x_ptr,
    depthwise_ptr,
    pointwise_ptr,
    bias_ptr,
    y_ptr,
    lengths_ptr,
    L,
    before,
    tiles_l,
    stride_xb: tl.int64,
    stride_xl,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND: tl.constexpr,
    G: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_L, BLOCK_N] of one group's outputs of one sequence."""
    stride_xb, stride_xl = stride_xb * ALIGNED, stride_xl * ALIGNED
    tiles_n: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile_n = program % tiles_n
    group = program // tiles_n % G
    tile_l = program // (tiles_n * G) % tiles_l
    batch = program // (tiles_n * G) // tiles_l
    valid = _valid_rows(lengths_ptr, batch, L, HAS_LENGTHS)
    first = tile_l * BLOCK_L
    local, n = tl.arange(0, BLOCK_L), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_base = x_ptr + batch.to(tl.int64) * stride_xb + group * I

    total = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    for start in range(0, I, BLOCK_K):
        c = start + k
        inside = c < I
        taps = depthwise_ptr + group * I * W
        h = _convolved(x_base, stride_xl, taps, first, local, c, inside, valid, before, W, False)
        # [BLOCK_K, BLOCK_N]
        weight = tl.load(
            pointwise_ptr + (group * O + n)[None, :] * I + c[:, None],
            mask=inside[:, None] & (n < O)[None, :],
            other=0.0,
        )
        h = rounded(h, weight.dtype, ROUND)
        if WIDEN:
            h, weight = h.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(h, weight, total, input_precision=PRECISION)
    if HAS_BIAS:
        # [BLOCK_N]
        bias = tl.load(bias_ptr + group * O + n, mask=n < O, other=0.0)
        total += bias.to(tl.float32)[None, :]
    rows = first + local
    total = tl.where((rows < valid)[:, None], total, 0.0)
    y = y_ptr + (batch.to(tl.int64) * L + rows)[:, None] * (G * O) + (group * O + n)[None, :]
    total = rounded(total, y_ptr.dtype.element_ty, ROUND)
    tl.store(y, total, mask=(rows < L)[:, None] & (n < O)[None, :])


@triton.jit(do_not_specialize=["L", "before", "tiles_l", "stride_xb", "stride_xl"])
def depthwise_convolution(
    x_ptr,
    depthwise_ptr,
    out_ptr,
    lengths_ptr,
    L,
    before,
    tiles_l,
    stride_xb: tl.int64,
    stride_xl,
    HAS_LENGTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUND: tl.constexpr,
    FLIP: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [B, L, C]: x convolved, FLIP with the taps reversed; zeros beyond the lengths."""
    stride_xb, stride_xl = stride_xb * ALIGNED, stride_xl * ALIGNED
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tile_l = program // tiles_c % tiles_l
    batch = program // tiles_c // tiles_l
    valid = _valid_rows(lengths_ptr, batch, L, HAS_LENGTHS)
    first, local = tile_l * BLOCK_L, tl.arange(0, BLOCK_L)
    x_base = x_ptr + batch.to(tl.int64) * stride_xb
    inside = c < C
    sums = _convolved(
        x_base, stride_xl, depthwise_ptr, first, local, c, inside, valid, before, W, FLIP
    )
    rows = first + local
    sums = tl.where((rows < valid)[:, None], sums, 0.0)
    out = out_ptr + (batch.to(tl.int64) * L + rows)[:, None] * C + c[None, :]
    sums = rounded(sums, out_ptr.dtype.element_ty, ROUND)
    tl.store(out, sums, mask=(rows < L)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows", "L", "before", "slice_rows", "stride_xb", "stride_xl"])
def depthwise_gradient(
    dh_ptr,
    x_ptr,
    parts_ptr,
    lengths_ptr,
    rows,
    L,
    before,
    slice_rows,
    stride_xb: tl.int64,
    stride_xl: tl.int64,
    HAS_LENGTHS: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """parts[s, c, j]: the sum of dh[l, c] x[l + j - before, c] over the rows of slice s."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    j = program // tiles_c % W
    part = program // tiles_c // W
    begin = part.to(tl.int64) * slice_rows
    end = tl.minimum(begin + slice_rows, rows)
    inside = (c < C)[None, :]
    sums = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, slice_rows, BLOCK_L):
        # [BLOCK_L]: rows of all sequences, one after the other
        row = begin + start + tl.arange(0, BLOCK_L)
        batch, at = row // L, row % L + j - before
        valid = at < L
        if HAS_LENGTHS:
            valid = at < tl.load(lengths_ptr + batch, mask=row < end, other=0)
        seen = ((row < end) & (at >= 0) & (at < L) & valid)[:, None] & inside
        # [BLOCK_L, BLOCK_C]
        dh = tl.load(dh_ptr + row[:, None] * C + c[None, :], mask=seen, other=0.0)
        x = tl.load(
            x_ptr + (batch * stride_xb + at * stride_xl)[:, None] + c[None, :],
            mask=seen,
            other=0.0,
        )
        sums += tl.sum(dh * x.to(tl.float32), axis=0)
    tl.store(parts_ptr + (part * C + c) * W + j, sums, mask=c < C)


def _aligned(x: torch.Tensor, inputs: int) -> int:
    """How many elements' multiple the strides and the groups' first channels are."""
    wide = 16 // x.element_size()
    return wide if all(n % wide == 0 for n in (*x.stride()[:2], inputs)) else 1


def _rounds(dtype: torch.dtype) -> bool:
    return INTERPRETED and dtype is torch.bfloat16


def forward(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None,
    lengths: torch.Tensor | None,
    y: torch.Tensor,
    before: int,
) -> None:
    """x [B, L, C] with contiguous channels, the rest contiguous -> y [B, L, G * O]."""
    batch, length, _ = x.shape
    groups, outputs, inputs = pointwise.shape
    if not y.numel():
        return
    config: LaunchConfig = heuristic(length, outputs, inputs, x.element_size())
    aligned = _aligned(x, inputs)
    tiles_l = ceil_div(length, config.block_rows)
    programs = batch * tiles_l * groups * ceil_div(outputs, config.block_outputs)
    with device_of(x):
        separable_forward[(programs,)](
            *(x, depthwise, pointwise, pointwise if bias is None else bias, y),
            y if lengths is None else lengths,
            *(length, before, tiles_l, x.stride(0) // aligned, x.stride(1) // aligned),
            HAS_BIAS=bias is not None,
            HAS_LENGTHS=lengths is not None,
            ALIGNED=aligned,
            PRECISION=fp32_precision() if x.dtype is torch.float32 else "ieee",
            WIDEN=_rounds(x.dtype),
            ROUND=_rounds(x.dtype),
            G=groups,
            O=outputs,
            I=inputs,
            W=depthwise.shape[1],
            BLOCK_L=config.block_rows,
            BLOCK_N=config.block_outputs,
            BLOCK_K=config.block_inputs,
            num_warps=config.num_warps,
        )


def convolve(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    before: int,
    *,
    flip: bool = False,
) -> None:
    """x [B, L, C] with contiguous channels -> out [B, L, C] contiguous, in its dtype."""
    batch, length, channels = x.shape
    aligned = _aligned(x, channels)
    tiles_l = ceil_div(length, CONVOLVED_ROWS)
    with device_of(x):
        depthwise_convolution[(batch * tiles_l * ceil_div(channels, CONVOLVED_CHANNELS),)](
            *(x, depthwise, out, out if lengths is None else lengths),
            *(length, before, tiles_l, x.stride(0) // aligned, x.stride(1) // aligned),
            HAS_LENGTHS=lengths is not None,
            ALIGNED=aligned,
            ROUND=_rounds(out.dtype),
            FLIP=flip,
            C=channels,
            W=depthwise.shape[1],
            BLOCK_L=CONVOLVED_ROWS,
            BLOCK_C=CONVOLVED_CHANNELS,
        )


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    lengths: torch.Tensor | None,
    before: int,
    dx: torch.Tensor | None,
    ddepthwise: torch.Tensor | None,
    dpointwise: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills the gradients that are wanted. dy [B, L, G * O] is zero beyond the lengths."""
    batch, length, channels = x.shape
    width, rows = depthwise.shape[1], batch * length
    if not rows:
        for gradient in (dx, ddepthwise, dpointwise, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    flat = dy.view(rows, -1)
    if dpointwise is not None:
        hidden = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
        convolve(x, depthwise, lengths, hidden, before)
        grouped.backward_weight(flat, hidden.view(rows, channels), dpointwise, dbias, False)
    if dx is None and ddepthwise is None:
        return
    dh = torch.empty((batch, length, channels), dtype=torch.float32, device=x.device)
    grouped.backward_x(flat, pointwise, dh.view(rows, channels), False)
    if dx is not None:
        convolve(dh, depthwise, lengths, dx, width - 1 - before, flip=True)
    if ddepthwise is not None:
        _depthwise_gradient(dh, x, lengths, before, ddepthwise)


def _depthwise_gradient(
    dh: torch.Tensor,
    x: torch.Tensor,
    lengths: torch.Tensor | None,
    before: int,
    ddepthwise: torch.Tensor,
) -> None:
    batch, length, channels = x.shape
    width, rows = ddepthwise.shape[1], batch * length
    block = power_of_two(channels, 16, 64)
    slices = row_slices(rows)
    slice_rows = ceil_div(ceil_div(rows, slices), CONVOLVED_ROWS) * CONVOLVED_ROWS
    parts: Any = torch.empty((slices, channels * width), dtype=torch.float32, device=x.device)
    with device_of(x):
        depthwise_gradient[(ceil_div(channels, block) * width * slices,)](
            *(dh, x, parts, parts if lengths is None else lengths),
            *(rows, length, before, slice_rows, x.stride(0), x.stride(1)),
            HAS_LENGTHS=lengths is not None,
            C=channels,
            W=width,
            BLOCK_L=CONVOLVED_ROWS,
            BLOCK_C=block,
        )
        size = channels * width
        grouped.sum_slices[(ceil_div(size, grouped.SUM_BLOCK),)](
            *(parts, ddepthwise, size, slices, size),
            ROUND=_rounds(ddepthwise.dtype),
            BLOCK=grouped.SUM_BLOCK,
        )

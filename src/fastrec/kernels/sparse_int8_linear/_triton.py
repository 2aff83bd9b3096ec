"""``sparse_int8_linear`` in Triton, over the steps of ``_device.py``.

A program multiplies a tile of rows of x by one panel of 32 outputs: per step it gathers the 32
inputs whose groups the panel keeps. x is multiplied as s8, 128 less than it is (Triton multiplies
alike types), and the sums' start makes up for it. For few rows a panel's steps are split over
several programs, whose exact integer sums are added by a second kernel: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrec import env
from fastrec.kernels._gpu import ceil_div, device_of
from fastrec.kernels.sparse_int8_linear._config import TritonConfig, triton_heuristic
from fastrec.kernels.sparse_int8_linear._cpu import ACTIVATION_CODES
from fastrec.kernels.sparse_int8_linear._gpu import Prepared

FINISH_ROWS = 16
# The interpreter cuts off instead of rounding to bfloat16.
INTERPRETED = env.triton_interpret()


@triton.jit
def _round_half_even(x):
    """x within +-2^22, to the nearest integer: adding 1.5 * 2^23 leaves no bit for a fraction.

    Through integers, because a compiler may take the two additions for nothing.
    """
    shifted = (x + 12582912.0).to(tl.int32, bitcast=True)
    return shifted - 1262485504


@triton.jit
def _quantise(x, inverse_scale, zero_point):
    """float32 -> 0..255 as int32; a NaN becomes 0."""
    scaled = x * inverse_scale
    # A product, because a number may come as one of Python's.
    low, high = (0 - zero_point) * 1.0, (255 - zero_point) * 1.0
    raised = tl.where(scaled > low, scaled, low)
    return _round_half_even(tl.where(raised < high, raised, high)) + zero_point


@triton.jit
def _gelu(value):
    """erf(y) = y * P(y^2) / Q(y^2) on |y| <= 4, error below 4.3e-7: a table, as the CPU has, would
    cost a gather."""
    half = 0.5 * value
    y = tl.minimum(tl.maximum(value * 0.7071067811865476, -4.0), 4.0)
    u = y * y
    p = tl.fma(u, 1.986956021937658e-06, 0.0002845456183422357)
    p = tl.fma(p, u, 0.0038823934737592936)
    p = tl.fma(p, u, 0.05309876427054405)
    p = tl.fma(p, u, 0.19352270662784576)
    p = tl.fma(p, u, 1.1283791065216064)
    q = tl.fma(u, 3.7420944863697514e-05, 0.0011853439500555396)
    q = tl.fma(q, u, 0.015205327421426773)
    q = tl.fma(q, u, 0.11534073948860168)
    q = tl.fma(q, u, 0.5048375725746155)
    q = tl.fma(q, u, 1.0)
    erf = tl.minimum(tl.maximum(tl.div_rn(y * p, q), -1.0), 1.0)
    return tl.fma(half, erf, half)


@triton.jit
def _finish(
    total,
    n,
    start_ptr,
    scale_ptr,
    bias_ptr,
    y_inverse_scale,
    y_zero_point,
    ACTIVATION: tl.constexpr,
    OUT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """The epilogue of sums [rows, 32]; every operation rounds once (no fused multiply-add: see the
    launch's options), as on the CPU."""
    # [32]
    start = tl.load(start_ptr + n)
    scale = tl.load(scale_ptr + n)
    bias = tl.load(bias_ptr + n)
    value = (total + start[None, :]).to(tl.float32) * scale[None, :] + bias[None, :]
    if ACTIVATION == 1:
        value = tl.where(value > 0.0, value, 0.0)
    if ACTIVATION == 2:
        value = _gelu(value)
    if tl.uint8 == OUT:
        return _quantise(value, y_inverse_scale, y_zero_point).to(tl.uint8)
    if ROUND:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(OUT)


# Sizes that change with calls or weights: specialised by divisibility they would compile anew.
@triton.jit(do_not_specialize=["M", "x_zero_point", "y_zero_point"])
def multiply(
    x_ptr,
    values_ptr,
    index_ptr,
    step_start_ptr,
    start_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    chunks,
    panels,
    splits,
    x_inverse_scale,
    x_zero_point,
    y_inverse_scale,
    y_zero_point,
    ACTIVATION: tl.constexpr,
    QUANTISE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One tile [BLOCK_M, 32] of y, or with SPLIT of the sums, int32 [splits, M, panels * 32]."""
    program = tl.program_id(0)
    panel = program % panels
    part = (program // panels) % splits
    m = (program // panels // splits) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, 32)
    # The inputs of STEPS steps: step i // 32, of it group i % 32 // 4, of that input i % 4.
    i = tl.arange(0, STEPS * 32)

    first = tl.load(step_start_ptr + panel * (chunks + 1))
    last = tl.load(step_start_ptr + panel * (chunks + 1) + chunks)
    share = tl.cdiv(last - first, splits)
    first = first + part * share
    last = tl.minimum(first + share, last)

    rows = x_ptr + m.to(tl.int64)[:, None] * K
    total = tl.zeros([BLOCK_M, 32], dtype=tl.int32)
    for done in range(0, last - first, STEPS):
        step = first.to(tl.int64) + done
        inside = step + i // 32 < last
        # [STEPS * 32]
        group = tl.load(index_ptr + step * 8 + i // 4, mask=inside, other=0)
        k = group * 4 + i % 4
        # [BLOCK_M, STEPS * 32]
        x = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (inside & (k < K))[None, :], other=0)
        if QUANTISE:
            x = _quantise(x.to(tl.float32), x_inverse_scale, x_zero_point).to(tl.uint8)
        signed = (x ^ 128).to(tl.int8, bitcast=True)
        # [STEPS * 32, 32]: 128 bytes a group, 4 an output
        at = step * 1024 + (i // 4 * 128 + i % 4)[:, None] + (n * 4)[None, :]
        w = tl.load(values_ptr + at, mask=inside[:, None], other=0)
        total = tl.dot(signed, w, total, out_dtype=tl.int32)
    n = panel * 32 + n
    if SPLIT:
        to = y_ptr + (part.to(tl.int64) * M + m)[:, None] * (panels * 32) + n[None, :]
        tl.store(to, total, mask=(m < M)[:, None])
    else:
        result = _finish(
            total,
            n,
            start_ptr,
            scale_ptr,
            bias_ptr,
            y_inverse_scale,
            y_zero_point,
            ACTIVATION,
            y_ptr.dtype.element_ty,
            ROUND,
        )
        to = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "y_zero_point"])
def finish(
    parts_ptr,
    start_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    panels,
    splits,
    y_inverse_scale,
    y_zero_point,
    ACTIVATION: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y from the parts of the sums, int32 [splits, M, panels * 32]."""
    program = tl.program_id(0)
    m = (program // panels) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (program % panels) * 32 + tl.arange(0, 32)
    total = tl.zeros([BLOCK_M, 32], dtype=tl.int32)
    # Splits are for few rows: all sums of a part are fewer than 2^31.
    at = parts_ptr + m[:, None] * (panels * 32) + n[None, :]
    for _ in range(splits):
        # [BLOCK_M, 32]
        total += tl.load(at, mask=(m < M)[:, None], other=0)
        at += M * (panels * 32)
    result = _finish(
        total,
        n,
        start_ptr,
        scale_ptr,
        bias_ptr,
        y_inverse_scale,
        y_zero_point,
        ACTIVATION,
        y_ptr.dtype.element_ty,
        ROUND,
    )
    to = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, result, mask=(m < M)[:, None] & (n < N)[None, :])


def run(
    prepared: Prepared, x: torch.Tensor, y: torch.Tensor, config: TritonConfig | None = None
) -> None:
    """y [M, N] of x [M, K], both contiguous, on torch's current stream; M > 0."""
    weight, rows = prepared.weight, x.shape[0]
    if config is None:
        config = triton_heuristic(rows, weight.panels, weight.steps)
    split = config.splits > 1
    target = y
    if split:
        shape = (config.splits, rows, weight.panels * 32)
        target = torch.empty(shape, dtype=torch.int32, device=x.device)
    tiles = ceil_div(rows, config.rows) * weight.panels
    epilogue = (prepared.start_of_signed, prepared.scale, prepared.bias)
    options = {
        "ACTIVATION": ACTIVATION_CODES[prepared.activation],
        "ROUND": INTERPRETED and y.dtype is torch.bfloat16,
        # One rounding an operation, as everywhere.
        "enable_fp_fusion": False,
    }
    with device_of(x):
        multiply[(tiles * config.splits,)](
            x,
            weight.values,
            weight.index,
            weight.step_start,
            *epilogue,
            target,
            rows,
            weight.outputs,
            weight.inputs,
            weight.chunks,
            weight.panels,
            config.splits,
            prepared.x_inverse_scale,
            prepared.x_zero_point,
            prepared.y_inverse_scale,
            prepared.y_zero_point,
            QUANTISE=x.is_floating_point(),
            SPLIT=split,
            BLOCK_M=config.rows,
            STEPS=config.steps,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **options,
        )
        if split:
            finish[(ceil_div(rows, FINISH_ROWS) * weight.panels,)](
                target,
                *epilogue,
                y,
                rows,
                weight.outputs,
                weight.panels,
                config.splits,
                prepared.y_inverse_scale,
                prepared.y_zero_point,
                BLOCK_M=FINISH_ROWS,
                **options,
            )

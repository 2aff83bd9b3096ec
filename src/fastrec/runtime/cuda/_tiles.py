"""The parts of the ranker's kernels: functions on tiles of rows that stay on the chip.

R rows of a tile, D width of the model, N outputs and K inputs of a layer. A layer is two pointers:
its weight [N, K] in the type that is multiplied in, and its parameters, float32, as
:func:`fastrec.runtime.cuda.weights.parameters` lays them out:

    1 / input scale, input zero point, the same of the tower's next layer, 12 unused,
    bias [N], scale [N], shift [N] (int32 bits: (zero point - 128) * sum of the weights)

An int8 layer multiplies s8 by s8: its u8 input less 128, which the shift takes back. Scale, bias
and requantisation are separate roundings in the CPU kernels' order (launches forbid fused
multiply-adds), so that the integers are theirs.
"""

import triton
import triton.language as tl

from fastrec import env

# The interpreter takes the bits of bfloat16 for integers when it multiplies, and cuts off instead
# of rounding to it: there, both are done in float32 by hand.
INTERPRETED = tl.constexpr(env.triton_interpret())
HEAD = tl.constexpr(16)  # floats before the bias of a layer's parameters
# 1.5 * 2^23: adding it rounds a float32 below 2^22 to the nearest even integer.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def to_type(x, dtype: tl.constexpr):
    """x, float32, rounded to nearest even in ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def quantised(x, inverse, zero):
    """x, float32, as u8 less 128 in int8."""
    clamped = tl.minimum(tl.maximum(x * inverse, -zero), 255.0 - zero)
    return ((clamped + ROUNDER - ROUNDER) + (zero - 128.0)).to(tl.int8)


@triton.jit
def operand(x, w_ptr, p_ptr):
    """A float32 tile as the layer multiplies it."""
    if w_ptr.dtype.element_ty == tl.int8:
        return quantised(x, tl.load(p_ptr), tl.load(p_ptr + 1))
    else:
        return to_type(x, w_ptr.dtype.element_ty)


@triton.jit
def times(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b: int32 of int8, else float32."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def no_sum(w_ptr, R: tl.constexpr, N: tl.constexpr):
    """Zeros to add a layer's products to."""
    if w_ptr.dtype.element_ty == tl.int8:
        return tl.zeros([R, N], tl.int32)
    else:
        return tl.zeros([R, N], tl.float32)


@triton.jit
def weights(w_ptr, n, k, N, K):
    """[len(k), len(n)] of a weight [N, K], zeros outside."""
    inside = (n < N)[:, None] & (k < K)[None, :]
    return tl.trans(tl.load(w_ptr + n[:, None] * K + k[None, :], mask=inside, other=0))


@triton.jit
def finished(acc, p_ptr, n, N, ACTIVATION: tl.constexpr):
    """Sums of products [R, len(n)] -> the layer's result in float32."""
    inside = n < N
    bias = tl.load(p_ptr + HEAD + n, mask=inside, other=0.0)
    if acc.dtype == tl.int32:
        scale = tl.load(p_ptr + HEAD + N + n, mask=inside, other=0.0)
        bits = tl.load(p_ptr + HEAD + 2 * N + n, mask=inside, other=0.0)
        y = (acc - bits.to(tl.int32, bitcast=True)[None, :]).to(tl.float32) * scale[None, :]
    else:
        y = acc
    y = y + bias[None, :]
    if ACTIVATION == 1:
        y = tl.maximum(y, 0.0)
    if ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    return y


@triton.jit
def normalised(x, norm_ptr, epsilon, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """LayerNorm of rows [R, BLOCK_D] whose columns beyond D are 0; ``norm_ptr`` [2, D]."""
    c = tl.arange(0, BLOCK_D)
    inside = c < D
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    y = centred * (1.0 / tl.sqrt(variance + epsilon))[:, None]
    gain = tl.load(norm_ptr + c, mask=inside, other=0.0)
    return y * gain[None, :] + tl.load(norm_ptr + D + c, mask=inside, other=0.0)[None, :]


@triton.jit
def projected(
    x,
    y_ptr,
    rows,
    valid,
    w_ptr,
    p_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes the layer of a tile x [R, BLOCK_K] to rows of y [.., N]."""
    k = tl.arange(0, BLOCK_K)
    a = operand(x, w_ptr, p_ptr)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        acc = times(a, weights(w_ptr, n, k, N, K), no_sum(w_ptr, R, BLOCK_N), PRECISION)
        y = to_type(finished(acc, p_ptr, n, N, 0), y_ptr.dtype.element_ty)
        at = y_ptr + rows.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, y, mask=valid[:, None] & (n < N)[None, :])


@triton.jit
def attended(
    q,
    k_ptr,
    v_ptr,
    stride: tl.constexpr,
    keys,
    scale,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One head: queries [R, BLOCK_D] over the first ``keys`` rows -> float32 [R, BLOCK_D].

    The softmax is taken as it goes along the keys, in float32; without a key the result is 0.
    """
    c = tl.arange(0, BLOCK_D)
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        inside = (key < keys)[:, None] & (c < D)[None, :]
        at = key[:, None] * stride + c[None, :]
        # [BLOCK_KEYS, BLOCK_D]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        score = times(q, tl.trans(k), tl.zeros([R, BLOCK_KEYS], tl.float32), PRECISION) * scale
        score = tl.where((key < keys)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = times(to_type(weight, v.dtype), v, acc * shrink[:, None], PRECISION)
        top = higher
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def looked_up(
    x,
    ids_ptr,
    table_ptr,
    scale_ptr,
    rows,
    valid,
    age,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x + a table's rows [R, BLOCK_D]; KIND 0: no table, 1: rows by id, 2: rows by age.

    An id outside the table reads nothing.
    """
    if KIND == 0:
        return x
    else:
        row = age
        if KIND == 1:
            row = tl.load(ids_ptr + rows, mask=valid, other=0)
        found = valid & (row >= 0) & (row < SIZE)
        c = tl.arange(0, BLOCK_D)
        at = table_ptr + row.to(tl.int64)[:, None] * D + c[None, :]
        y = tl.load(at, mask=found[:, None] & (c < D)[None, :], other=0).to(tl.float32)
        if table_ptr.dtype.element_ty == tl.int8:
            y = y * tl.load(scale_ptr + row, mask=found, other=0.0)[:, None]
        return x + y


@triton.jit
def grid_barrier(counter_ptr, programs):
    """Returns once every program of the launch has come here; all must be resident at once.

    The counter, int64, only ever grows, so that it is never reset: each barrier ends at the next
    multiple of the number of programs.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    until = (seen // programs + 1) * programs
    now = seen + 1
    while now < until:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()

"""Constants and functions of the Triton kernels of several ops."""

from __future__ import annotations

import triton
import triton.language as tl

from fastrec import env

# The interpreter takes the bits of bfloat16 for integers when it multiplies, and cuts off instead
# of rounding to it: there, products are made in float32 (as exact) and sums rounded by hand.
INTERPRETED = env.triton_interpret()


@triton.jit
def rounded(x, dtype: tl.constexpr, ROUND: tl.constexpr):
    """x, float32, in ``dtype``, rounded to nearest even; ROUND where the interpreter would cut."""
    if ROUND:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)

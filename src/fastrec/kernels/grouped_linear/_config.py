"""How the Triton kernel of ``grouped_linear`` is launched: tile sizes by shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastrec.kernels._gpu import ceil_div, power_of_two

# Programs that fill a large GPU once: 132 SMs of an H100, 148 of a B200.
FULL_GPU = 128
# A slice of a sum shorter than this is not worth its trip through memory.
SLICE_TERMS = 256
MAX_SLICES = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program and what runs it.

    ``slices`` splits the reduction; partial sums are added in their order by a second kernel, so
    the result is the same bits in every run. It depends on the shape alone, never on the GPU.
    """

    block_rows: int
    block_cols: int
    block_terms: int
    num_warps: int
    num_stages: int
    slices: int


def _bucket(number: int) -> int:
    return power_of_two(number, 16, 1 << 30)


def heuristic(
    rows: int, cols: int, terms: int, groups: int, itemsize: int, *, sliced: bool = False
) -> LaunchConfig:
    """The configuration for C[rows, cols] = sum over ``terms``, one product per group.

    ``sliced`` allows the reduction to be split.
    """
    return _of_bucket(_bucket(rows), _bucket(cols), _bucket(terms), groups, itemsize, sliced)


@functools.lru_cache(maxsize=4096)
def _of_bucket(
    rows: int, cols: int, terms: int, groups: int, itemsize: int, sliced: bool
) -> LaunchConfig:
    block_rows, block_cols = min(rows, 128), min(cols, 64 if itemsize == 4 else 128)
    # Smaller row tiles until the GPU has work for all its SMs.
    while block_rows > 16 and _tiles(rows, cols, block_rows, block_cols) * groups < FULL_GPU:
        block_rows //= 2
    slices = 1
    if sliced:
        block_rows, block_cols = min(rows, 64), min(cols, 64)
        tiles = _tiles(rows, cols, block_rows, block_cols) * groups
        slices = min(ceil_div(terms, SLICE_TERMS), ceil_div(2 * FULL_GPU, tiles), MAX_SLICES)
    block_terms = min(terms, 32 if itemsize == 4 else 64)
    # Float32 operands fill the registers of 4 warps earlier.
    num_warps = 8 if block_rows * block_cols >= (64 * 64 if itemsize == 4 else 128 * 128) else 4
    return LaunchConfig(block_rows, block_cols, block_terms, num_warps, 3, max(slices, 1))


def _tiles(rows: int, cols: int, block_rows: int, block_cols: int) -> int:
    return ceil_div(rows, block_rows) * ceil_div(cols, block_cols)

"""How the Triton kernels of ``window_sparse_attention`` are launched: tile sizes by shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastrec.kernels._gpu import power_of_two


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program and what runs it.

    Attributes:
        block_rows: rows that a program works for: queries, or keys where their gradient is made.
        block_others: how many of the other side one matrix product of the window takes.
        num_warps, num_stages: of the program; stages of the loop over the window.
        far_stages: stages of the loop over far positions.
    """

    block_rows: int
    block_others: int
    num_warps: int
    num_stages: int
    far_stages: int


# Longest sequence whose keys and values one program takes at once, and their most bytes each.
SHORT_ROWS = 256
SHORT_BYTES = 32 * 1024


def is_short(rows: int, dims: int, itemsize: int) -> bool:
    """Whether one program can take all keys of a head."""
    keys = power_of_two(rows, 16, 1 << 30)
    return rows <= SHORT_ROWS and keys * block_dims(dims) * itemsize <= SHORT_BYTES


def short(rows: int, dims: int, itemsize: int) -> LaunchConfig:
    """The configuration for all keys of a head at once; ``block_others`` holds them."""
    keys = power_of_two(rows, 16, SHORT_ROWS)
    # Scores and sums of a tile of queries are in registers together.
    large = keys > 128 or block_dims(dims) > 128
    most = 32 if itemsize == 4 or large else 64
    wide = keys * most >= 128 * 64 or block_dims(dims) * most >= 128 * 64
    # Exact float32 products hold their operands in registers too.
    wide = wide or (itemsize == 4 and keys * block_dims(dims) >= 128 * 64)
    return LaunchConfig(min(keys, most), keys, 8 if wide else 4, 1, 1)


def block_dims(dims: int) -> int:
    """D as wide as a tile: a power of two, at least what a matrix instruction takes."""
    return power_of_two(dims, 16, 256)


def heuristic(
    rows: int,
    window: int,
    dims: int,
    itemsize: int,
    *,
    aligned: bool = True,
    backward: bool = False,
) -> LaunchConfig:
    """The configuration for sequences of at most ``rows`` rows.

    ``aligned``: rows can be read in vectors. ``backward``: for the gradients.
    """
    bucket = power_of_two(rows, 16, 64)
    return _of_bucket(bucket, window > 16, block_dims(dims), itemsize, aligned, backward)


@functools.lru_cache(maxsize=1024)
def _of_bucket(
    rows: int, wide: bool, dims: int, itemsize: int, aligned: bool, backward: bool
) -> LaunchConfig:
    """As many rows as leave all sums in registers: what the compiler says, see the tests."""
    if not aligned:
        # Every element has an address of its own.
        return LaunchConfig(16, 16 if itemsize == 4 or backward else 32, 8, 2, 1)
    if itemsize == 4:
        # Multiplied without matrix units, where float32 is to be exact.
        most = 32 if dims <= (32 if backward else 64) else 16
        num_warps = 4 if dims <= (64 if backward else 32) else 8
        return LaunchConfig(min(rows, most), most, num_warps, 2, 1 if backward else 2)
    # A window of 16 and a tile of 64 are 96 keys: three blocks of 32.
    others = 64 if wide else 32
    if backward:
        # Two tiles of inputs and two of sums stay with the program, not one and one.
        most = 64 if dims <= 64 else 4096 // dims
        if dims <= 32:
            return LaunchConfig(min(rows, most), others, 4, 2, 2)
        # A second stage is what makes an MI300 spill.
        return LaunchConfig(min(rows, most), 32, 8, 1 if dims <= 64 else 2, 1)
    if dims > 128:
        return LaunchConfig(min(rows, 32), 32, 8, 2, 1)
    return LaunchConfig(rows, others, 4 if dims <= 64 else 8, 2, 2)

"""How the Triton kernels of ``pointwise_attention`` are launched: tile sizes by shape."""

from __future__ import annotations

from dataclasses import dataclass

from fastrec.kernels._gpu import power_of_two


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program and what runs it.

    Attributes:
        block_rows: rows that a program works for: queries, or keys where their gradient is made.
        block_others: how many of the other side one matrix product takes.
        num_warps, num_stages: of the program; stages of its loop.
    """

    block_rows: int
    block_others: int
    num_warps: int
    num_stages: int


def block_dims(dims: int) -> int:
    """D as wide as a tile: a power of two, at least what a matrix instruction takes."""
    return power_of_two(dims, 16, 256)


def heuristic(
    rows: int, dims: int, itemsize: int, *, aligned: bool = True, backward: bool = False
) -> LaunchConfig:
    """The configuration for sequences of at most ``rows`` rows: as many rows as leave all sums in
    registers, which the compiler tells the tests.

    ``dims``: the wider of D and Dv. ``aligned``: rows can be read in vectors.
    """
    bucket, width = power_of_two(rows, 16, 64), block_dims(dims)
    if not aligned or width > 128:
        # Every element has an address of its own, or sums fill the registers.
        return LaunchConfig(16, 16 if itemsize == 4 or backward else 32, 8, 1)
    if itemsize == 4:
        # Multiplied without matrix units, where float32 is to be exact.
        most = 32 if width <= 64 and not backward else 16
        return LaunchConfig(min(bucket, most), most, 8, 1)
    if backward:
        return LaunchConfig(bucket, 32, 4 if width <= 32 else 8, 1)
    # Blocks of 64 keys would spill: times and edges are 64 bits wide.
    return LaunchConfig(bucket, 32, 4 if width <= 64 else 8, 2)

"""How the Triton kernels of ``separable_projection`` are launched: tile sizes by shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastrec.kernels._gpu import ceil_div, power_of_two

# A slice of a sum over rows shorter than this is not worth its trip through memory.
SLICE_ROWS = 512
MAX_SLICES = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program and what runs it: rows of one sequence by outputs of one group."""

    block_rows: int
    block_outputs: int
    block_inputs: int
    num_warps: int


def heuristic(length: int, outputs: int, inputs: int, itemsize: int) -> LaunchConfig:
    """The configuration for sequences of ``length`` rows and one group's channels."""
    return _of_bucket(power_of_two(length, 16, 64), outputs, inputs, itemsize)


@functools.lru_cache(maxsize=4096)
def _of_bucket(rows: int, outputs: int, inputs: int, itemsize: int) -> LaunchConfig:
    # Convolved rows and sums of a tile stay in registers; each is made anew for every tile of
    # outputs, so there are few of those.
    wide = 64 if itemsize == 4 else 128
    return LaunchConfig(
        min(rows, 32 if itemsize == 4 else 64),
        power_of_two(outputs, 16, wide),
        power_of_two(inputs, 16, 32),
        8 if outputs > wide // 2 else 4,
    )


def row_slices(rows: int) -> int:
    """How many parts a sum over the rows is made in; by the shape alone, never by the GPU."""
    return max(min(ceil_div(rows, SLICE_ROWS), MAX_SLICES), 1)

"""How the ranker's kernels are launched: tiles by the room that a batch gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastrec.kernels._gpu import ceil_div, power_of_two

# Outputs of a panel, whose groups are kept or dropped together.
PANEL = 32
# Programs that fill a GPU where its own number is not known: 132 SMs of an H100.
FULL_GPU = 132


class Sizes(NamedTuple):
    """Of a request, or what a bucket has room for."""

    users: int
    length: int
    candidates: int


@dataclass(frozen=True)
class RowsConfig:
    """A program's tile of rows, the keys and the outputs it takes at a time."""

    rows: int
    keys: int
    outputs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TowerConfig:
    """A program's tile of a tower layer; ``skips``: it multiplies what a pruned layer kept."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    skips: bool = False


def rows_config(
    users: int,
    rows: int,
    itemsize: int,
    programs: int = FULL_GPU,
    *,
    keys: int = 64,
    most: int = 32,
) -> RowsConfig:
    """For ``users`` sequences of up to ``rows`` rows: the largest tile that fills the GPU.

    ``most`` rows of a block's intermediate results fill the registers of 8 warps.
    """
    tile = most
    while tile > 16 and users * ceil_div(rows, tile) < programs:
        tile //= 2
    wide = itemsize < 4
    return RowsConfig(tile, keys if wide else 32, 64 if wide else 32, 8 if tile > 16 else 4, 2)


def tower_config(rows: int, widest: int, itemsize: int, programs: int = FULL_GPU) -> TowerConfig:
    """For ``rows`` candidates and layers of up to ``widest`` outputs."""
    inputs = {1: 128, 2: 64}.get(itemsize, 32)
    sizes = [(128, 128, 8), (64, 128, 8), (64, 64, 4), (32, 64, 4), (16, 64, 4), (16, 32, 4)]
    if itemsize > 2:
        sizes = sizes[2:]
    fitting = (s for s in sizes if ceil_div(rows, s[0]) * ceil_div(widest, s[1]) >= programs)
    tile, outputs, warps = next(fitting, sizes[-1])
    return TowerConfig(tile, min(outputs, power_of_two(widest, 32, 128)), inputs, warps, 3)


def sparse_tower_config(rows: int, widest: int, programs: int = FULL_GPU) -> TowerConfig:
    """The same for int8 layers of which only kept groups are multiplied, panel by panel."""
    panels = ceil_div(widest, PANEL)
    fitting = (tile for tile in (128, 64, 32) if ceil_div(rows, tile) * panels >= programs)
    tile = next(fitting, 16)
    # A third stage spills a register.
    return TowerConfig(tile, PANEL, 4 * PANEL, 8 if tile == 128 else 4, 2, skips=True)


def skipping_pays(
    rows: int,
    layers: Sequence[tuple[int, int]],
    density: float,
    dense: TowerConfig,
    kept: TowerConfig,
) -> bool:
    """Whether a pruned tower of layers [N, K] reads less from L2 where it skips.

    Tiles of skipped layers are one panel wide, so that they read activations more often; and of
    those whole sectors of 8 groups, of which few are dropped altogether.
    """
    sectors = 1 - (1 - density) ** 8

    def bytes_read(config: TowerConfig, weights: float, activations: float) -> float:
        tiles = ceil_div(rows, config.rows)
        return sum(
            weights * tiles * n * k + activations * ceil_div(n, config.outputs) * rows * k
            for n, k in layers
        )

    return bytes_read(kept, density, sectors) < bytes_read(dense, 1.0, 1.0)

"""How the GPU kernels of ``sparse_int8_linear`` are launched: tiles by shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastrec.kernels._gpu import ceil_div, power_of_two

# Blocks that fill a large GPU once: 132 SMs of an H100, 148 of a B200.
FULL_GPU = 128

# Shared memory of a CUDA block: the constants of params.cuh.
_STAGES, _ROW_BYTES, _SUMS_ROW_BYTES = 2, 512 + 16, (32 + 4) * 4


@dataclass(frozen=True)
class CudaConfig:
    """One instantiation of the CUDA kernel (params.cuh).

    ``rows`` of a block; ``wide`` panels a warp, 2 for weights whose panels are paired; ``panels``
    warps side by side; ``slices`` warps that share a panel's steps; ``ahead`` steps whose weights
    are under way; ``bands`` warps that take other rows of the same panels; ``two_four`` for weights
    in that form.
    """

    rows: int
    wide: int
    panels: int
    slices: int
    ahead: int
    bands: int = 1
    two_four: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.panels * self.slices * self.bands

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        sums = self.slices * self.panels * self.wide * self.rows * _SUMS_ROW_BYTES
        return max(_STAGES * self.rows * _ROW_BYTES, sums)

    def blocks(self, rows: int, panels: int) -> int:
        """Blocks of a launch."""
        return ceil_div(rows, self.rows) * ceil_div(panels, self.panels * self.wide)


# The compiled kernels, largest tiles first: the more rows share a weight and the more panels share
# an activation, the less is read.
CUDA_CONFIGS = (
    CudaConfig(128, 2, 4, 1, 1, 2),
    CudaConfig(128, 1, 8, 1, 1, 2),
    CudaConfig(64, 2, 4, 1, 1),
    CudaConfig(64, 1, 8, 1, 1),
    CudaConfig(64, 1, 4, 2, 1),
    CudaConfig(32, 2, 2, 4, 1),
    CudaConfig(32, 1, 2, 4, 2),
    CudaConfig(16, 1, 1, 8, 2),
    CudaConfig(8, 1, 1, 8, 2),
    CudaConfig(128, 2, 4, 1, 1, 2, two_four=True),
    CudaConfig(128, 1, 8, 1, 1, 2, two_four=True),
    CudaConfig(64, 2, 4, 1, 1, two_four=True),
    CudaConfig(64, 1, 4, 2, 1, two_four=True),
    CudaConfig(32, 2, 2, 4, 1, two_four=True),
    CudaConfig(16, 1, 1, 8, 1, two_four=True),
    CudaConfig(8, 1, 1, 8, 1, two_four=True),
)


def cuda_configs(paired: bool, two_four: bool) -> list[CudaConfig]:
    """Those for weights of that kind."""
    alike = [config for config in CUDA_CONFIGS if config.two_four == two_four]
    return [config for config in alike if paired or config.wide == 1]


def cuda_heuristic(rows: int, panels: int, paired: bool, two_four: bool = False) -> CudaConfig:
    """The largest tile of which there are enough to fill a GPU, else the smallest that holds all
    rows at once or is the smallest of all."""
    possible = cuda_configs(paired, two_four)
    for config in possible:
        if config.rows <= max(rows, 8) and config.blocks(rows, panels) >= FULL_GPU:
            return config
    return possible[-1] if rows <= 8 else possible[-2]


@dataclass(frozen=True)
class TritonConfig:
    """Tile of one Triton program: rows of x by one panel, ``steps`` of 32 inputs at a time, and
    over how many programs a panel's steps are split."""

    rows: int
    steps: int
    splits: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=4096)
def _triton_of_bucket(rows: int, panels: int, steps: int) -> TritonConfig:
    block = min(max(rows, 16), 128)
    while block > 16 and ceil_div(rows, block) * panels < FULL_GPU:
        block //= 2
    tiles = ceil_div(rows, block) * panels
    # A split shorter than 8 steps is not worth its trip through memory.
    splits = max(1, min(ceil_div(FULL_GPU, tiles), steps // 8, 16))
    return TritonConfig(block, 2 if block >= 64 else 4, splits, 4, 3)


def triton_heuristic(rows: int, panels: int, steps: int) -> TritonConfig:
    """By powers of two of the rows and of the most steps of a panel, so that few kernels are
    compiled."""
    return _triton_of_bucket(
        power_of_two(rows, 16, 1 << 30), panels, power_of_two(steps, 1, 1 << 30)
    )

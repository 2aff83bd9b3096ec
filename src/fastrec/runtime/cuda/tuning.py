"""Tuned tiles of the tower: which was fastest on a GPU, by the shape of a bucket.

Dense tiles, and for a pruned int8 tower those that skip; so that whether skipping pays is measured
where the heuristic counts bytes.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastrec.errors import BackendError
from fastrec.kernels import _tuning
from fastrec.kernels._gpu import power_of_two
from fastrec.runtime.cuda.config import PANEL, Sizes, TowerConfig
from fastrec.runtime.cuda.weights import Tower

if TYPE_CHECKING:
    from fastrec.runtime.cuda.executor import Executor
    from fastrec.runtime.cuda.launches import Launch

_SOURCES = ("_tower_kernels.py", "_tiles.py")
# Rows and outputs of a tile.
_TILES = ((128, 128), (64, 128), (64, 64), (32, 128), (32, 64), (16, 128), (16, 64), (16, 32))


@functools.cache
def table(device: torch.device) -> _tuning.Table | None:
    """The table of a GPU; None for what is none."""
    if device.type != "cuda":
        return None
    import triton

    folder = Path(__file__).parent
    source = "".join((folder / name).read_text() for name in _SOURCES)
    gpu = _tuning.gpu_name(device.index)
    return _tuning.Table("ranker_tower", gpu, source, (f"triton {triton.__version__}",))


def key(tower: Tower, rows: int) -> str:
    """Key of an entry: rows of a bucket, layers N x K, type, and the share that is kept."""
    layers = " ".join(f"{outputs}x{inputs}" for outputs, inputs, *_ in tower.places)
    kept = 1.0 if tower.kept is None else tower.kept.density
    kind = str(tower.weight.dtype).removeprefix("torch.")
    return f"{power_of_two(rows, 1, 1 << 30)} {layers} {kind} {kept:.1f}"


def possible(tower: Tower) -> list[TowerConfig]:
    """Every tile that is tried: of float32 the smaller ones."""
    size = tower.weight.element_size()
    tiles = [tile for tile in _TILES if size <= 2 or tile[0] * tile[1] <= 64 * 64]
    found = [
        TowerConfig(rows, outputs, 128 // size, 8 if rows * outputs >= 64 * 128 else 4, stages)
        for (rows, outputs), stages in itertools.product(tiles, (2, 3, 4))
    ]
    if tower.kept is not None:
        found += [
            TowerConfig(rows, PANEL, 4 * PANEL, warps, stages, skips=True)
            for rows, warps in ((128, 8), (64, 4), (32, 4), (16, 4), (16, 2))
            for stages in (2, 3, 4)
        ]
    return found


def known(tower: Tower, rows: int) -> TowerConfig | None:
    """The tuned tile for a bucket on the tower's GPU, if there is one."""
    found = table(tower.weight.device)
    return None if found is None else found.find(key(tower, rows), possible(tower))


def tune_tower(executor: Executor, users: int, candidates: int) -> str:
    """Times every tile on the executor's GPU for requests of these sizes, keeps the fastest and
    says which. Engines that are made later take it.

    Raises:
        BackendError: the executor is on no GPU, or none of the tiles runs on it.
    """
    from triton.runtime.errors import OutOfResources

    found = table(executor.device)
    if found is None:
        raise BackendError("there is no GPU to tune the tower on")
    sizes = executor.bucket_of(Sizes(users, 1, candidates))
    tower = executor.weights.tower
    times: dict[TowerConfig, float] = {}
    for config in possible(tower):
        bucket = executor.made(sizes, config)
        bucket.inputs[:3] = torch.tensor(sizes, dtype=torch.int32)
        launches = [launch for launch in bucket.launches if launch.name.startswith("tower")]

        def run(launches: list[Launch] = launches) -> None:
            for launch in launches:
                launch()

        try:
            times[config] = _tuning.device_time_ms(run)
        except (RuntimeError, OutOfResources):  # too large a tile for this GPU
            continue
    if not times:
        raise BackendError("no tile of the tower runs on this GPU")
    best = min(times, key=times.__getitem__)
    found.keep(key(tower, sizes.users * sizes.candidates), best)
    return f"tower, {users} users, {candidates} candidates: {1e3 * times[best]:.1f} us, {best}"

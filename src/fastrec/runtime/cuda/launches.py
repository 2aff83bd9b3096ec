"""A ranker's launches for one bucket of sizes: kernels, arguments, and what each must move.

    history        lookups, their sum, norm and the first block's q, k, v
    encoder_block  attention, output projection, feed-forward part, and the next q, k, v (or k, v)
    candidates     lookups, norm, cross attention, and the tower's input
    tower          all layers and the scores, persistent, with barriers across the grid
    tower_layer, tower_scores   the same tiles, a launch a layer

Sizes of a request (users, L, m) are data, read from a header on the device: one compiled kernel and
one captured graph serve every batch, history and candidate count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastrec.kernels._gpu import ceil_div, power_of_two
from fastrec.runtime.cuda import _candidate_kernels, _encoder_kernels, _tower_kernels
from fastrec.runtime.cuda.config import (
    FULL_GPU,
    Sizes,
    TowerConfig,
    rows_config,
    skipping_pays,
    sparse_tower_config,
    tower_config,
)
from fastrec.runtime.cuda.stages import RankerStages
from fastrec.runtime.cuda.tuning import known
from fastrec.runtime.cuda.weights import Layer, Lookups, Weights

HEADER = 16  # int32s: users, L, m, and unused ones that keep what follows aligned
_ALIGNED = 16
# All that a request launches, with the tower as one launch or as several.
KERNELS = (
    _encoder_kernels.history,
    _encoder_kernels.encoder_block,
    _candidate_kernels.candidates,
    _tower_kernels.tower,
    _tower_kernels.tower_layer,
    _tower_kernels.tower_scores,
)
_PLACE = 8  # int64s a layer of the tower


@dataclass
class Launch:
    """One kernel launch; ``macs`` and ``bytes`` as :class:`fastrec.kernels._registry.Sample` counts
    them, for a full bucket."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    macs: int
    bytes: int
    int8: bool
    config: Any = field(default=None)

    def __call__(self) -> None:
        """On the current stream."""
        self.kernel[self.grid](*self.args, **self.options)


def input_places(stages: RankerStages, sizes: Sizes) -> tuple[dict[int, int], int]:
    """Where each input begins in the staged int32s, and how many there are."""
    history = {t.ids for t in stages.terms if t.ids is not None}
    candidates = {t.ids for t in stages.cross.terms if t.ids is not None}
    counts = {stages.length: sizes.users}
    counts |= dict.fromkeys(sorted(history), sizes.users * sizes.length)
    counts |= dict.fromkeys(sorted(candidates), sizes.users * sizes.candidates)
    places, end = {}, HEADER
    for index, count in counts.items():
        places[index] = end
        end += ceil_div(count, _ALIGNED) * _ALIGNED
    return places, end


class Bucket:
    """Buffers and launches for requests of up to ``sizes``."""

    def __init__(
        self,
        stages: RankerStages,
        weights: Weights,
        sizes: Sizes,
        precision: str,
        persistent: bool,
        programs: int = FULL_GPU,
        amd: bool = False,
        config: TowerConfig | None = None,
    ) -> None:
        """``config``: the tower's tile; the tuned one or the heuristic's by default."""
        self.stages, self.weights, self.sizes = stages, weights, sizes
        self.precision, self.persistent, self.programs = precision, persistent, programs
        self._most = 16 if amd else 32  # rows of a tile that do not spill there
        device, dtype, d = weights.device, weights.dtype, stages.d
        users, length, candidates = sizes
        self.on_gpu = device.type != "cpu"
        self.places, staged = input_places(stages, sizes)
        self.inputs = torch.zeros(staged, dtype=torch.int32, device=device)
        # Beyond a length nothing is written, and what is read there is multiplied by zeros.
        self.x = torch.zeros(users * length * d, device=device)
        widest = max(p.layer.outputs for p in stages.projections)
        self.projected = torch.zeros(2, users * length * widest, dtype=dtype, device=device)
        rows = self.rows = users * candidates
        places = weights.tower.places
        width = max(outputs for outputs, *_ in places)
        begins = [0, rows * places[0][1], rows * (places[0][1] + width)]
        kind = weights.tower.weight.dtype
        self.work = torch.zeros(begins[2] + rows * width, dtype=kind, device=device)
        self.config = config or known(weights.tower, rows) or self._tile(width)
        self.kept = weights.tower.kept if self.config.skips else None
        layers = torch.zeros(len(places), _PLACE, dtype=torch.int64)
        for i, place in enumerate(places):
            source = begins[0] if i == 0 else begins[1 + (i + 1) % 2]
            layers[i, :6] = torch.tensor([*place, source, begins[1 + i % 2]])
            layers[i, 6] = 0 if self.kept is None else self.kept.places[i][0]
        self.layers = layers.to(device)
        self.parts = ceil_div(places[-1][0], self.config.outputs)
        sums = torch.int32 if weights.tower.score_int8 else torch.float32
        self.partial = torch.zeros(self.parts * rows, dtype=sums, device=device)
        self.scores = torch.zeros(rows, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.launches = [self._history(), *map(self._block, range(len(stages.blocks)))]
        self.launches += [self._candidates(), *self._tower()]

    def _tile(self, width: int) -> TowerConfig:
        """The tower's: one that skips where that reads less."""
        kept, places = self.weights.tower.kept, self.weights.tower.places
        dense = tower_config(self.rows, width, self.work.element_size(), self.programs)
        if kept is None:
            return dense
        config = sparse_tower_config(self.rows, width, self.programs)
        layers = [(outputs, inputs) for outputs, inputs, *_ in places]
        pays = skipping_pays(self.rows, layers, kept.density, dense, config)
        return config if pays else dense

    def _launch(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        config: Any,
        macs: int,
        moved: int,
        int8: bool,
        **options: Any,
    ) -> Launch:
        # No fused multiply-adds: int8 layers round as the CPU's kernels do.
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        options["enable_fp_fusion"] = not self.stages.is_int8
        return Launch(name, kernel, grid, args, options, macs, moved, int8, config)

    @property
    def _rows_config(self) -> Any:
        size = self.weights.dtype.itemsize
        users, length, _ = self.sizes
        return rows_config(users, length, size, self.programs, most=self._most)

    def _blocks(self, config: Any, heads: int | None = None) -> dict[str, int]:
        d = self.stages.d
        blocks = {"R": config.rows, "BLOCK_D": power_of_two(d, 32, 1 << 20), "D": d}
        if heads is not None:
            blocks["BLOCK_HEAD"] = power_of_two(d // heads, 32, 1 << 20)
            blocks["BLOCK_KEYS"] = config.keys
            blocks["HEADS"] = heads
        return blocks

    def _ids(self, lookups: Lookups) -> list[torch.Tensor]:
        return [self.inputs[0 if i is None else self.places[i] :] for i in lookups.ids]

    def _tables(self, lookups: Lookups) -> list[torch.Tensor]:
        return [*self._ids(lookups), *lookups.tables, *lookups.scales]

    @property
    def lengths(self) -> torch.Tensor:
        """int32, a user each."""
        return self.inputs[self.places[self.stages.length] :]

    def _history(self) -> Launch:
        w, config, users = self.weights, self._rows_config, self.sizes.users
        layer, norm = w.projections[0], w.norms[0]
        rows = users * self.sizes.length
        args = (
            self.inputs,
            self.lengths,
            *self._tables(w.history),
            norm,
            layer.weight,
            layer.parameters,
            self.x,
            self.projected[0],
            self.stages.projections[0].norm.epsilon,
        )
        moved = rows * (w.history.row_bytes + 4 * self.stages.d) + self._written(layer, rows)
        return self._launch(
            "history",
            _encoder_kernels.history,
            (ceil_div(self.sizes.length, config.rows), users),
            args,
            config,
            rows * layer.outputs * layer.inputs,
            moved + layer.bytes + norm.nbytes,
            layer.weight.dtype == torch.int8,
            KINDS=w.history.kinds,
            SIZES=w.history.sizes,
            N=layer.outputs,
            PRECISION=self.precision,
            BLOCK_N=config.outputs,
            **self._blocks(config),
        )

    def _written(self, layer: Layer, rows: int) -> int:
        return rows * layer.outputs * self.weights.dtype.itemsize

    def _block(self, index: int) -> Launch:
        w, config, users = self.weights, self._rows_config, self.sizes.users
        block, after = self.stages.blocks[index], self.stages.projections[index + 1]
        out, norm, first, second = w.blocks[index]
        layer, d = w.projections[index + 1], self.stages.d
        rows = users * self.sizes.length
        source, target = self.projected[index % 2], self.projected[1 - index % 2]
        args = (
            self.inputs,
            self.lengths,
            self.x,
            source,
            target,
            out.weight,
            out.parameters,
            norm,
            first.weight,
            first.parameters,
            second.weight,
            second.parameters,
            w.norms[index + 1],
            layer.weight,
            layer.parameters,
            block.scale,
            block.norm.epsilon,
            after.norm.epsilon,
        )
        layers = (out, first, second, layer)
        attended = 2 * rows * self.sizes.length * d
        moved = self._written(w.projections[index], rows) + self._written(layer, rows)
        moved += 8 * rows * d + norm.nbytes + w.norms[index + 1].nbytes
        return self._launch(
            f"encoder_block {index}",
            _encoder_kernels.encoder_block,
            (ceil_div(self.sizes.length, config.rows), users),
            args,
            config,
            attended + rows * sum(a.outputs * a.inputs for a in layers),
            moved + sum(a.bytes for a in layers),
            first.weight.dtype == torch.int8,
            N=layer.outputs,
            HIDDEN=first.outputs,
            ACTIVATION=first.activation,
            PRECISION=self.precision,
            BLOCK_N=config.outputs,
            **self._blocks(config, block.heads),
        )

    def _candidates(self) -> Launch:
        w, users, d = self.weights, self.sizes.users, self.stages.d
        size = self.sizes.candidates
        config = rows_config(users, size, w.dtype.itemsize, self.programs, keys=32, most=self._most)
        cross, rows = self.stages.cross, users * size
        kv = self.projected[len(self.stages.blocks) % 2]
        args = (
            self.inputs,
            self.lengths,
            *self._tables(w.candidates),
            w.candidate_norm,
            w.query.weight,
            w.query.parameters,
            kv,
            w.cross_out.weight,
            w.cross_out.parameters,
            w.tower.parameters,
            self.work,
            cross.norm.epsilon,
            cross.scale,
        )
        layers = (w.query, w.cross_out)
        keys = users * self.sizes.length
        moved = self._written(w.projections[-1], keys) + rows * w.candidates.row_bytes
        moved += rows * 3 * d * self.work.element_size() + w.candidate_norm.nbytes
        return self._launch(
            "candidates",
            _candidate_kernels.candidates,
            (ceil_div(size, config.rows), users),
            args,
            config,
            2 * rows * self.sizes.length * d + rows * sum(a.outputs * a.inputs for a in layers),
            moved + sum(a.bytes for a in layers),
            w.query.weight.dtype == torch.int8,
            KINDS=w.candidates.kinds,
            SIZES=w.candidates.sizes,
            Z_STRIDE=w.tower.places[0][1],
            PRECISION=self.precision,
            **self._blocks(config, cross.heads),
        )

    def _tower(self) -> list[Launch]:
        tower, config, rows = self.weights.tower, self.config, self.rows
        int8 = tower.weight.dtype == torch.int8
        size = self.work.element_size()
        kept = self.kept
        # Anything with an address where nothing is skipped.
        held = (tower.weight, self.layers, self.layers)
        if kept is not None:
            held = (kept.weight, kept.index, kept.starts)
        common = (*held, tower.parameters, tower.score, self.partial)
        tile: dict[str, Any] = {
            "SKIPS": kept is not None,
            "ACTIVATION": tower.activation,
            "PRECISION": self.precision,
            "BLOCK_M": config.rows,
            "BLOCK_N": config.outputs,
            "BLOCK_K": config.inputs,
        }
        tiles = [
            ceil_div(rows, config.rows) * ceil_div(n, config.outputs) for n, *_ in tower.places
        ]
        multiplied = [n * k for n, k, *_ in tower.places]
        moved = [n * k * size + 12 * n for n, k, *_ in tower.places]
        if kept is not None:
            # 32 groups of 4 inputs by 32 outputs a step, and their numbers.
            multiplied = [4096 * steps for _, steps in kept.places]
            moved = [
                (4096 + 128) * steps + 12 * n
                for (_, steps), (n, *_) in zip(kept.places, tower.places, strict=True)
            ]
        macs = [rows * count for count in multiplied]
        if self.persistent:
            # Programs that wait for each other must all be resident: one a multiprocessor.
            programs = min(self.programs, max(tiles)) if self.on_gpu else 1
            cooperative = {"launch_cooperative_grid": True} if self.on_gpu else {}
            args: tuple[Any, ...] = (
                self.inputs,
                self.work,
                self.layers,
                *common,
                self.scores,
                self.counter,
                rows,
            )
            total = sum(moved) + rows * (tower.places[0][1] * size + 4)
            return [
                self._launch(
                    "tower",
                    _tower_kernels.tower,
                    (programs,),
                    args,
                    config,
                    sum(macs) + rows * tower.places[-1][0],
                    total,
                    int8,
                    LAYERS=len(tower.places),
                    PARTS=self.parts,
                    **tile,
                    **cooperative,
                )
            ]
        launches = []
        for i, (n, k, *_) in enumerate(tower.places):
            args = (self.inputs, self.work, self.layers[i], *common, rows)
            last = i == len(tower.places) - 1
            activations = rows * (k + n * (not last)) * size
            launches.append(
                self._launch(
                    f"tower_layer {i}",
                    _tower_kernels.tower_layer,
                    (tiles[i],),
                    args,
                    config,
                    macs[i],
                    moved[i] + activations,
                    int8,
                    LAST=last,
                    **tile,
                )
            )
        args = (self.inputs, tower.score, self.partial, self.scores, rows)
        moved_scores = 4 * rows * (self.parts + 1)
        launches.append(
            self._launch(
                "tower_scores",
                _tower_kernels.tower_scores,
                (ceil_div(rows, 32),),
                args,
                config,
                rows * self.parts,
                moved_scores,
                False,
                PARTS=self.parts,
            )
        )
        return launches

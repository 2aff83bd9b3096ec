"""A ranker's constants on the device, in the layouts that the kernels read."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from fastrec.errors import BackendError
from fastrec.kernels._gpu import ceil_div
from fastrec.runtime.cuda.stages import Dense, Norm, RankerStages, Term

HEAD = 16  # as in _tiles.py
_PAD = 32


@dataclass(frozen=True)
class Layer:
    """A layer's weight and parameters on the device, and its sizes."""

    weight: torch.Tensor
    parameters: torch.Tensor
    outputs: int
    inputs: int
    activation: int

    @property
    def bytes(self) -> int:
        """Of both."""
        return self.weight.nbytes + self.parameters.nbytes


@dataclass(frozen=True)
class Lookups:
    """The tables of a sum of lookups, four slots; ``kinds``: 0 none, 1 by id, 2 by age."""

    tables: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]
    ids: tuple[int | None, ...]
    kinds: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Read for one event: a row of each table, its scale and its id."""
        used = [i for i, kind in enumerate(self.kinds) if kind]
        return sum(
            self.tables[i].shape[1] * self.tables[i].element_size()
            + 4 * (self.tables[i].dtype == torch.int8)
            + 4 * (self.kinds[i] == 1)
            for i in used
        )


@dataclass(frozen=True)
class Kept:
    """The groups of 4 inputs by 32 outputs that a pruned int8 tower keeps, in steps of 32 groups.

    Attributes:
        weight: int8 [steps, 4, 32, 32]: of each step, input i of 4, output and group.
        index: int32 [steps, 32]; first input of the group / 4. A step is filled up with zeros.
        starts: int32; of each layer, the first step of every panel of 32 outputs, and the end.
        places: (begin of starts, steps) a layer.
        density: share of the groups that is kept.
    """

    weight: torch.Tensor
    index: torch.Tensor
    starts: torch.Tensor
    places: tuple[tuple[int, int], ...]
    density: float


@dataclass(frozen=True)
class Tower:
    """Hidden layers in one piece. ``places``: (N, K, begin of weights, of parameters) a layer,
    N and K padded to multiples of 32 with zeros; ``score``: bias, 1 / input scale, input zero
    point, scale, shift (int32 bits), 11 unused, weights; without int8, bias and weights alone."""

    weight: torch.Tensor
    parameters: torch.Tensor
    places: tuple[tuple[int, int, int, int], ...]
    activation: int
    score: torch.Tensor
    score_int8: bool
    kept: Kept | None


def kept_groups(weights: list[torch.Tensor]) -> Kept | None:
    """Of padded int8 weights [N, K]; None where nothing was pruned."""
    values: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    starts: list[int] = []
    places: list[tuple[int, int]] = []
    first = kept_count = count = 0
    for weight in weights:
        panels, groups = weight.shape[0] // _PAD, weight.shape[1] // 4
        # [panels, groups, 4, 32 outputs]
        blocks = weight.view(panels, _PAD, groups, 4).permute(0, 2, 3, 1)
        begin, before = len(starts), first
        for panel in blocks:
            index = (panel != 0).any(2).any(1).nonzero()[:, 0]
            steps = ceil_div(len(index), _PAD)
            free = steps * _PAD - len(index)
            rows = torch.cat([panel[index], panel.new_zeros(free, 4, _PAD)])
            values.append(rows.view(steps, _PAD, 4, _PAD).permute(0, 2, 3, 1))
            indices.append(torch.nn.functional.pad(index, (0, free)))
            starts.append(first)
            first += steps
            kept_count += len(index)
        starts.append(first)
        places.append((begin, first - before))
        count += panels * groups
    if kept_count == count:
        return None
    return Kept(
        torch.cat(values).contiguous(),
        torch.cat(indices).to(torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        tuple(places),
        kept_count / count,
    )


def _inverse(scale: float) -> np.float32:
    """As the CPU's kernels round it."""
    return np.float32(1) / np.float32(scale)


def parameters(dense: Dense, outputs: int) -> torch.Tensor:
    """float32 [16 + 3 outputs] of a layer, as _tiles.py says; ``outputs`` may be padded."""
    flat = np.zeros(HEAD + 3 * outputs, np.float32)
    bias, scale, shift = (flat[HEAD + i * outputs :][: dense.outputs] for i in range(3))
    if dense.bias is not None:
        bias[:] = dense.bias
    if (q := dense.quantised) is not None:
        flat[:2] = _inverse(q.scale), q.zero
        scale[:] = np.float32(q.scale) * q.weight_scale
        sums = dense.weight.sum(1, dtype=np.int64)
        shift.view(np.int32)[:] = ((q.zero - 128) * sums).astype(np.int32)
    return torch.from_numpy(flat)


class Weights:
    """All constants of a ranker on ``device``; float layers and tables in ``dtype``."""

    def __init__(self, stages: RankerStages, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.history = self._lookups(stages.terms)
        self.norms = [self._norm(p.norm) for p in stages.projections]
        self.projections = [self._layer(p.layer) for p in stages.projections]
        self.blocks = [
            (self._layer(b.out), self._norm(b.norm), self._layer(b.first), self._layer(b.second))
            for b in stages.blocks
        ]
        cross = stages.cross
        self.candidates = self._lookups(cross.terms)
        self.candidate_norm = self._norm(cross.norm)
        self.query, self.cross_out = self._layer(cross.query), self._layer(cross.out)
        self.tower = self._tower(stages)

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device).contiguous()

    def _weight(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(array))
        return tensor if tensor.dtype == torch.int8 else tensor.to(self.dtype)

    def _layer(self, dense: Dense) -> Layer:
        return Layer(
            self._there(self._weight(dense.weight)),
            self._there(parameters(dense, dense.outputs)),
            dense.outputs,
            dense.inputs,
            dense.activation,
        )

    def _norm(self, norm: Norm) -> torch.Tensor:
        return self._there(torch.from_numpy(np.stack([norm.weight, norm.bias])))

    def _lookups(self, terms: tuple[Term, ...]) -> Lookups:
        tables = [self._there(self._weight(t.table)) for t in terms]
        one = torch.ones(1, device=self.device)
        scales = [one if t.scale is None else self._there(torch.tensor(t.scale)) for t in terms]
        ids = [t.ids for t in terms]
        kinds = [2 if t.ids is None else 1 for t in terms]
        sizes = [len(t.table) for t in terms]
        if max(sizes) >= 2**31:
            raise BackendError("the cuda engine reads ids as int32: a table has 2^31 rows or more")
        free = 4 - len(terms)
        return Lookups(
            (*tables, *[tables[0]] * free),
            (*scales, *[one] * free),
            (*ids, *[None] * free),
            (*kinds, *[0] * free),
            (*sizes, *[0] * free),
        )

    def _tower(self, stages: RankerStages) -> Tower:
        places, weights, vectors = [], [], []
        weight_at = vector_at = 0
        for dense, after in itertools.pairwise([*stages.tower, stages.score]):
            outputs, inputs = (ceil_div(n, _PAD) * _PAD for n in dense.weight.shape)
            padding = (0, inputs - dense.inputs, 0, outputs - dense.outputs)
            weight = torch.nn.functional.pad(self._weight(dense.weight), padding)
            vector = parameters(dense, outputs)
            if after.quantised is not None:
                # Written as the next layer takes it, which spares a float in between.
                vector[2] = float(_inverse(after.quantised.scale))
                vector[3] = after.quantised.zero
            places.append((outputs, inputs, weight_at, vector_at))
            weights.append(weight)
            vectors.append(vector)
            weight_at += weight.numel()
            vector_at += vector.numel()
        own = parameters(stages.score, 1).numpy()
        score = np.zeros(HEAD + places[-1][0], np.float32)
        # As a layer's parameters, of its one output.
        score[[0, 1, 2, 3, 4]] = own[[HEAD, 0, 1, HEAD + 1, HEAD + 2]]
        score[HEAD : HEAD + stages.score.inputs] = stages.score.weight[0]
        kept = kept_groups(weights) if weights[0].dtype == torch.int8 else None
        if kept is not None:
            parts = [self._there(part) for part in (kept.weight, kept.index, kept.starts)]
            kept = dataclasses.replace(kept, weight=parts[0], index=parts[1], starts=parts[2])
        return Tower(
            self._there(torch.cat([weight.reshape(-1) for weight in weights])),
            self._there(torch.cat(vectors)),
            tuple(places),
            stages.tower[0].activation,
            self._there(torch.from_numpy(score)),
            stages.score.quantised is not None,
            kept,
        )

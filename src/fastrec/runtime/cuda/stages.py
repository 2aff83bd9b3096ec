"""A ranker as stages for the GPU executor, each of which is one launch. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of a layer's result, as in plans: 0 none, 1 ReLU, 2 GELU.
RELU, GELU = 1, 2


@dataclass(frozen=True, eq=False)
class Quantisation:
    """How an int8 layer takes its input and what it hands on.

    Attributes:
        scale: of the input; a step of it in the layer's units.
        zero: of the input, 0..255.
        weight_scale: float32 [N].
        out_scale, out_zero: of the result where that is uint8; None where it is a float.
    """

    scale: float
    zero: int
    weight_scale: np.ndarray
    out_scale: float | None
    out_zero: int


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear layer: weight [N, K], float32, or int8 (then with ``quantised``); bias [N]."""

    weight: np.ndarray
    bias: np.ndarray | None
    activation: int
    quantised: Quantisation | None
    module: str

    @property
    def outputs(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.weight.shape[1])


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm: weight and bias [d]."""

    weight: np.ndarray
    bias: np.ndarray
    epsilon: float


@dataclass(frozen=True, eq=False)
class Term:
    """One table of a sum of lookups.

    Attributes:
        ids: the input that holds the ids; None where the id is the event's age, counted from the
            newest one.
        table: [rows, d], float32, or int8 with ``scale`` float32 [rows].
    """

    ids: int | None
    table: np.ndarray
    scale: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Projection:
    """A layer of the normalised rows, which a stage hands to the next one's attention."""

    norm: Norm
    layer: Dense


@dataclass(frozen=True, eq=False)
class Block:
    """x + out(attention), then x + second(first(norm(x)))."""

    scale: float
    heads: int
    out: Dense
    norm: Norm
    first: Dense
    second: Dense


@dataclass(frozen=True, eq=False)
class Cross:
    """Candidates' lookups, their norm and their attention over the history."""

    terms: tuple[Term, ...]
    norm: Norm
    query: Dense
    scale: float
    heads: int
    out: Dense


@dataclass(frozen=True, eq=False)
class RankerStages:
    """A ranker. ``projections[i]`` feeds block i, the last one the cross attention (its k and v).

    ``length`` is the input of the lengths, ``history`` and ``candidates`` one of the id inputs of
    each kind, whose shapes say L and m.
    """

    d: int
    length: int
    history: int
    candidates: int
    terms: tuple[Term, ...]
    projections: tuple[Projection, ...]
    blocks: tuple[Block, ...]
    cross: Cross
    tower: tuple[Dense, ...]
    score: Dense

    @property
    def is_int8(self) -> bool:
        """Whether any layer or table is int8."""
        layers = [p.layer for p in self.projections] + [self.cross.query, self.cross.out]
        for block in self.blocks:
            layers += [block.out, block.first, block.second]
        tables = [*self.terms, *self.cross.terms]
        return any(layer.quantised for layer in [*layers, *self.tower]) or any(
            term.scale is not None for term in tables
        )

"""The state of users: their histories encoded, to be scored and taken further. No torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, BackendError, ShapeError
from fastrec.spec import InputSpec

# The symbol of the candidates' number in the specs of fastrec's own models.
CANDIDATES = "m"


def candidate_positions(
    spec: InputSpec, candidates: str | int | Sequence[str | int] | None = None
) -> tuple[int, ...]:
    """Which inputs are the candidates', in order.

    Args:
        spec: the model's inputs.
        candidates: names or positions; by default the inputs with a dimension ``m``.

    Raises:
        ArgumentError: an unknown name or position, no candidate input, or no other one.
    """
    names = spec.names
    wanted = f"names or positions of the inputs that hold candidates, of {list(names)}"
    if candidates is None:
        found = [i for i, f in enumerate(spec.fields) if CANDIDATES in f.dims]
        if not found:
            raise ArgumentError(
                "candidates", wanted, f"none, and no input has a dimension {CANDIDATES!r}"
            )
    else:
        given = [candidates] if isinstance(candidates, str | int) else list(candidates)
        found = []
        for one in given:
            known = one in names if isinstance(one, str) else one in range(len(names))
            if isinstance(one, bool) or not known:
                raise ArgumentError("candidates", wanted, repr(one))
            found.append(names.index(one) if isinstance(one, str) else one)
    if not found or len(set(found)) == len(names):
        raise ArgumentError("candidates", "some of the inputs, not all", f"{len(set(found))}")
    return tuple(sorted(set(found)))


@dataclass(frozen=True, eq=False)
class State:
    """The encoded histories of B users; immutable, for any number of threads.

    Attributes:
        sizes: the histories' sizes by symbol, e.g. ``{"B": 1, "L": 100}``.
        lengths: events of each user, of a state that events can be appended to; else None.
    """

    native: Any = dataclasses.field(repr=False)
    parts: Parts = dataclasses.field(repr=False)
    sizes: Mapping[str, int]
    lengths: tuple[int, ...] | None = None

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The values, read-only."""
        return tuple(self.native.values)

    @property
    def output(self) -> np.ndarray:
        """The model's result for these histories, where it has no candidates; read-only.

        Raises:
            BackendError: it has, and :meth:`PlanEngine.score` gives it.
        """
        if self.parts.native.scores:
            raise BackendError("a state of a model with candidates has no output: score(state, …)")
        return self.arrays[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(self.native.nbytes)


class Parts:
    """A program in two: the histories, and the candidates. The compiled part runs both; what it
    does not take as it comes is checked here, converted or refused.

    Args:
        native: the compiled parts.
        spec: the inputs of the whole program.
    """

    def __init__(self, native: Any, spec: InputSpec) -> None:
        def of(positions: Sequence[int]) -> InputSpec:
            return InputSpec(tuple(spec.fields[i] for i in positions), spec.limits)

        self.native = native
        self._history, self._candidates = of(native.history), of(native.candidates)
        self._events = of(native.events)

    def encode(self, history: tuple[Any, ...], threads: int) -> State:
        """The state of histories, numpy or torch."""
        native = self.native.encode(history, threads)
        if native is None:
            native = self.native.encode(_checked(self._history, history)[0], threads)
        return self._state(native)

    def append(self, state: State, events: tuple[Any, ...], threads: int) -> State:
        """The state after these events of its users."""
        if not self.native.appends:
            raise ArgumentError(
                "state", "one of encode(..., appendable=True)", "one that keeps no past"
            )
        native = self.native.append(state.native, events, threads)
        if native is None:
            native = self.native.append(state.native, _checked(self._events, events)[0], threads)
        return self._state(native)

    def score(self, state: State, candidates: tuple[Any, ...], threads: int) -> Any:
        """The scores of candidates, numpy or torch as these are."""
        if not self.native.scores:
            raise BackendError("this model has no candidates to score: see the state's output")
        scores = self.native.score(state.native, candidates, threads)
        if scores is not None:
            return scores
        arrays, from_torch = _checked(self._with_sizes(state), candidates)
        for f, array in zip(self._candidates.fields, arrays, strict=True):
            for d, size in enumerate(f.dims):
                given = array.shape[d]
                if isinstance(size, str) and state.sizes.get(size, given) != given:
                    raise ShapeError(
                        f.name,
                        f"{size} = {state.sizes[size]} at dimension {d}, as in the state",
                        f"shape {list(array.shape)}",
                    )
        scores = self.native.score(state.native, arrays, threads)
        return sys.modules["torch"].from_numpy(scores) if from_torch else scores

    def _state(self, native: Any) -> State:
        lengths = tuple(native.lengths) if self.native.appends else None
        return State(native, self, MappingProxyType(self.native.sizes(native)), lengths)

    def _with_sizes(self, state: State) -> InputSpec:
        """The candidates' inputs, with the ranges that the histories' sizes decide."""
        own = {d for f in self._candidates.fields for d in f.dims}
        fields = tuple(
            dataclasses.replace(f, rows=state.sizes[f.rows] + 1)
            if isinstance(f.rows, str) and f.rows not in own and f.rows in state.sizes
            else f
            for f in self._candidates.fields
        )
        return InputSpec(fields, self._candidates.limits)


def aligned(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Arrays that a spec has accepted, as the compiled part reads them: contiguous, aligned, and
    int64 where they are ``longlong``, which numpy counts as another type."""
    return tuple(np.require(a, requirements=["C", "A"]).view(a.dtype.str) for a in arrays)


def _checked(spec: InputSpec, inputs: tuple[Any, ...]) -> tuple[tuple[np.ndarray, ...], bool]:
    """The inputs as the compiled part reads them, and whether they are torch's."""
    arrays, from_torch = spec.check(inputs)
    return aligned(arrays), from_torch

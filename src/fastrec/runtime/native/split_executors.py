"""Runs a split program: histories are encoded once, then scored against candidates any number of
times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, ShapeError
from fastrec.runtime.native.append import Appends
from fastrec.runtime.native.emit import executor
from fastrec.runtime.native.faults import error_of
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.split import split, whole
from fastrec.runtime.native.user_state import Past, State, aligned, freeze
from fastrec.spec import InputSpec


class SplitExecutors:
    """The executors of a split program's two parts; they share the packed weights of the whole
    program's executor."""

    def __init__(
        self,
        program: Program,
        spec: InputSpec,
        executor_of_all: Any,
        threads: int,
        candidates: tuple[int, ...],
        appendable: bool = False,
    ) -> None:
        parts = split(program, candidates) if candidates else whole(program)
        self.threads, self.split = threads, parts
        fields, limits = spec.fields, spec.limits
        self._history = InputSpec(tuple(fields[i] for i in parts.history), limits)
        self._kept = [parts.history.index(i) for i in parts.kept]
        # Before the executors are made, which tell outputs from other buffers.
        computed = [parts.encode.output, *parts.encode.more_outputs]
        self._appends = (
            Appends(executor_of_all, threads, parts, self._history) if appendable else None
        )
        if self._appends is not None:
            parts.encode.more_outputs.extend(self._appends.views)
        self._results = [v.buffer for v in (parts.encode.output, *parts.encode.more_outputs)]
        self._computed = len(computed)
        native = executor_of_all
        self._encode, self._encode_constants = executor(parts.encode, native, parts.encode_origins)
        self._encode_sizes = _places(parts.encode)
        if parts.score is None:
            return
        self._candidates = InputSpec(tuple(fields[i] for i in parts.candidates), limits)
        known = {d for f in self._history.fields for d in f.dims}
        for f in self._history.fields:
            if isinstance(f.rows, str) and f.rows not in known:
                raise ArgumentError(
                    "candidates", f"the input that brings {f.rows} beside {f.name}", "another part"
                )
        # Dimensions of the candidates' inputs that the histories decide.
        self._shared = [
            (i, d, size)
            for i, f in enumerate(self._candidates.fields)
            for d, size in enumerate(f.dims)
            if size in known and isinstance(size, str)
        ]
        own = {d for f in self._candidates.fields for d in f.dims}
        self._ranges = any(
            isinstance(f.rows, str) and f.rows not in own for f in self._candidates.fields
        )
        self._score, self._score_constants = executor(parts.score, native, parts.score_origins)
        self._score_sizes = _places(parts.score)

    def encode(self, inputs: Sequence[Any]) -> State:
        """The state of checked histories."""
        arrays = [np.ascontiguousarray(a) for a in self._history.check(inputs)[0]]
        sizes = {s: arrays[i].shape[d] for s, (i, d) in self._encode_sizes.items()}
        made = [aligned([e.at(sizes) for e in b.shape], b.dtype) for b in self._results]
        into = [a.ctypes.data for a in made]
        self._run(self._encode, self.split.encode, sizes, self._history.names, arrays, into)
        made, caches = made[: self._computed], made[self._computed :]
        for i in self._kept:
            made.append(aligned(arrays[i].shape, arrays[i].dtype))
            made[-1][...] = arrays[i]
        past = None if self._appends is None else self._appends.begun(arrays, caches, sizes)
        return self.state(made, sizes, past)

    def state(self, made: Sequence[np.ndarray], sizes: dict[str, int], past: Past | None) -> State:
        """A state of these values, which become read-only."""
        for array in (*made, *(past.caches if past else ())):
            freeze(array)
        addresses = tuple(a.ctypes.data for a in made)
        lengths = None if past is None else past.lengths
        return State(tuple(made), MappingProxyType(sizes), self, addresses, lengths, past)

    def append(self, state: State, events: Sequence[Any]) -> State:
        """The state after these events of its users."""
        if self._appends is None or state._past is None:
            raise ArgumentError(
                "state", "one of encode(..., appendable=True)", "one that keeps no past"
            )
        return self._appends.append(state, events)

    def score(self, state: State, inputs: Sequence[Any]) -> Any:
        """The scores of candidates, numpy or torch as these are."""
        if self.split.score is None:
            raise BackendError("this model has no candidates to score: see the state's output")
        arrays, from_torch = self._spec(state).check(inputs)
        for i, d, symbol in self._shared:
            if arrays[i].shape[d] != state.sizes[symbol]:
                raise ShapeError(
                    self._candidates.fields[i].name,
                    f"{symbol} = {state.sizes[symbol]} at dimension {d}, as in the state",
                    f"shape {list(arrays[i].shape)}",
                )
        arrays = [np.ascontiguousarray(a) for a in arrays]
        known = (*arrays, *state.arrays)
        sizes = {s: known[i].shape[d] for s, (i, d) in self._score_sizes.items()}
        sizes.update(state.sizes)
        assert self.split.score is not None
        output = self.split.score.output
        out = np.empty([e.at(sizes) for e in output.shape], output.dtype)
        names = (*self._candidates.names, *["state"] * len(state.arrays))
        into = [out.ctypes.data]
        self._run(self._score, self.split.score, sizes, names, arrays, into, state)
        if not from_torch:
            return out
        import torch

        return torch.from_numpy(out)

    def _spec(self, state: State) -> InputSpec:
        if not self._ranges:
            return self._candidates
        fields = tuple(
            dataclasses.replace(f, rows=state.sizes[f.rows] + 1)
            if isinstance(f.rows, str) and f.rows in state.sizes
            else f
            for f in self._candidates.fields
        )
        return InputSpec(fields, self._candidates.limits)

    def _run(
        self,
        native: Any,
        program: Program,
        sizes: dict[str, int],
        names: Sequence[str],
        arrays: list[np.ndarray],
        outputs: list[int],
        state: State | None = None,
    ) -> None:
        inputs = [a.ctypes.data for a in arrays]
        if state is not None:
            inputs += state._addresses
            arrays = [*arrays, *state.arrays]
        with kernels.call_threads(self.threads):
            fault, step, value = native.run([sizes[s] for s in program.symbols], inputs, outputs)
        if fault:
            raise error_of(program, names, fault, step, value, sizes, arrays)


def _places(program: Program) -> dict[str, tuple[int, int]]:
    """Symbol -> an input and dimension that has its size."""
    return {
        size.symbols[0]: (i, d)
        for i, buffer in enumerate(program.inputs)
        for d, size in enumerate(buffer.shape)
        if size.coefficient == 1 and len(size.symbols) == 1
    }

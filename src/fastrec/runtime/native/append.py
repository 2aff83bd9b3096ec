"""New events of users whose histories a state holds: their rows alone are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import BackendError, ShapeError
from fastrec.runtime.native.buffers import Extent, Shape, View
from fastrec.runtime.native.emit import executor
from fastrec.runtime.native.faults import error_of
from fastrec.runtime.native.resume import PAST, resume
from fastrec.runtime.native.split import Split
from fastrec.runtime.native.user_state import Past, State, aligned
from fastrec.spec import InputSpec


class Appends:
    """Computes states after new events; shares the packed weights of the whole program's
    executor."""

    def __init__(
        self, executor_of_all: Any, threads: int, parts: Split, history: InputSpec
    ) -> None:
        self.threads, self._history = threads, history
        self._users, self._events_symbol, self._events, self._lengths = _roles(history)
        self._others = [i for i in range(len(history.fields)) if i not in self._events]
        self._kept = [parts.history.index(i) for i in parts.kept]
        results = [parts.encode.output, *parts.encode.more_outputs]
        made = resume(parts.encode, self._events_symbol, self._users, results)
        #: Buffers that the first part has to return beside its results.
        self.views: list[View] = [buffer.view() for buffer in made.caches]
        self._results = len(results)
        self._buffers = [v.buffer for v in (*results, *self.views)]
        self._axes = [self._row_axis(buffer.shape) for buffer in self._buffers]
        fields = tuple(history.fields[i] for i in self._events)
        self._spec = InputSpec(fields, history.limits)
        origins = [parts.encode_origins[o] if o >= 0 else -1 for o in made.origins]
        self._program = made.program
        self._native, self._constants = executor(made.program, executor_of_all, origins)
        self._outputs = [v.buffer for v in (made.program.output, *made.program.more_outputs)]

    def begun(
        self, inputs: Sequence[np.ndarray], caches: Sequence[np.ndarray], sizes: dict[str, int]
    ) -> Past:
        """The past of histories just encoded."""
        lengths = (sizes[self._events_symbol],) * sizes[self._users]
        if self._lengths is not None:
            lengths = tuple(inputs[self._lengths].tolist())
        return Past(tuple(caches), tuple(inputs[i].copy() for i in self._others), lengths)

    def append(self, state: State, events: Sequence[Any]) -> State:
        """The state after ``events``, as many for each of its users."""
        past = state._past
        assert past is not None
        arrays = [np.ascontiguousarray(a) for a in self._spec.check(events)[0]]
        users, count = arrays[0].shape[:2]
        self._require_room(state, past, users, count)
        lengths = tuple(length + count for length in past.lengths)
        sizes = {**state.sizes, self._events_symbol: max(lengths)}
        inputs: dict[int, np.ndarray] = dict(zip(self._events, arrays, strict=True))
        inputs.update(zip(self._others, past.others, strict=True))
        if self._lengths is not None:
            inputs[self._lengths] = np.asarray(lengths, inputs[self._lengths].dtype)
        made = [aligned([e.at(sizes) for e in b.shape], b.dtype) for b in self._buffers]
        before = [*state.arrays[: self._results], *past.caches]
        for user, length in enumerate(past.lengths):
            new = self._rows_of(user, inputs, past, state.sizes, count)
            for array, old, rows, axis in zip(made, before, new, self._axes, strict=True):
                _continue(array[user], old[user], rows[0], axis, length)
        kept = []
        for i, old in zip(self._kept, state.arrays[self._results :], strict=True):
            if i not in self._events:
                kept.append(inputs[i])
                continue
            kept.append(aligned((users, max(lengths), *old.shape[2:]), old.dtype))
            for user, length in enumerate(past.lengths):
                _continue(kept[-1][user], old[user], inputs[i][user], 0, length)
        caches = tuple(made[self._results :])
        others = tuple(inputs[i] for i in self._others)
        values = [*made[: self._results], *kept]
        return state._executors.state(values, sizes, Past(caches, others, lengths))

    def _require_room(self, state: State, past: Past, users: int, count: int) -> None:
        name = self._spec.fields[0].name
        if users != state.sizes[self._users]:
            raise ShapeError(name, f"{state.sizes[self._users]} users, as in the state", f"{users}")
        longest = max(past.lengths)
        most = self._history.limits.get(self._events_symbol, (1, None))[1]
        if most is not None and longest + count > most:
            raise ShapeError(
                name,
                f"at most {most} events with the {longest} of the state (encode the newest "
                f"{most} anew)",
                f"{count} more",
            )

    def _rows_of(
        self,
        user: int,
        inputs: dict[int, np.ndarray],
        past: Past,
        sizes: Mapping[str, int],
        count: int,
    ) -> list[np.ndarray]:
        """The new rows of one user: of the results, then of the caches."""
        own = {
            **sizes, self._users: 1, self._events_symbol: count, PAST: sizes[self._events_symbol]
        }  # fmt: skip
        arrays = [
            inputs[i][user : user + 1] if self._users in f.dims else inputs[i]
            for i, f in enumerate(self._history.fields)
        ]
        arrays += [cache[user : user + 1] for cache in past.caches]
        arrays.append(np.asarray([past.lengths[user]]))
        made = [aligned([e.at(own) for e in b.shape], b.dtype) for b in self._outputs]
        with kernels.call_threads(self.threads):
            fault, step, value = self._native.run(
                [own[s] for s in self._program.symbols],
                [a.ctypes.data for a in arrays],
                [a.ctypes.data for a in made],
            )
        if fault:
            names = (*self._history.names, *["state"] * (len(arrays) - len(self._history.names)))
            raise error_of(self._program, names, fault, step, value, own, arrays)
        return made

    def _row_axis(self, shape: Shape) -> int | None:
        """Which dimension of a user's values counts events."""
        own = [d for d, size in enumerate(shape) if self._events_symbol in size.symbols]
        plain = all(shape[d] == Extent.of(self._events_symbol) for d in own)
        if shape[0] != Extent.of(self._users) or len(own) > 1 or not plain:
            raise BackendError(
                "this plan cannot append events: its state is not a row for each event of a user"
            )
        return own[0] - 1 if own else None


def _roles(history: InputSpec) -> tuple[str, str, list[int], int | None]:
    """The symbols of users and events, which inputs are events, and which has their number."""
    fields = history.fields
    users = {f.dims[0] for f in fields if f.dims}
    symbols = {d for f in fields for d in f.dims[1:] if isinstance(d, str)}
    if len(users) != 1 or len(symbols) != 1 or not isinstance(next(iter(users)), str):
        raise BackendError(
            "this model cannot append events: its histories need one free size beside the users', "
            f"and have {sorted(map(str, symbols))}"
        )
    (first,), (symbol,) = users, symbols
    events = [i for i, f in enumerate(fields) if symbol in f.dims]
    if any(fields[i].dims[1] != symbol or symbol in fields[i].dims[2:] for i in events):
        raise BackendError(f"this model cannot append events: {symbol} is not their second size")
    counts = [i for i, f in enumerate(fields) if f.dims == (first,) and f.rows == symbol]
    return str(first), symbol, events, counts[0] if counts else None


def _continue(
    into: np.ndarray, old: np.ndarray, new: np.ndarray, axis: int | None, length: int
) -> None:
    """``length`` old rows, then the new ones; zeros stay behind them."""
    if axis is None:
        into[...] = new
        return
    end = length + new.shape[axis]
    before, now, rest = (
        (*(slice(None),) * axis, rows)
        for rows in (slice(length), slice(length, end), slice(end, None))
    )
    into[before] = old[before]
    into[now] = new
    into[rest] = 0

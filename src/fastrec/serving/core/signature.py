"""How a model's inputs are split into sub-requests and joined into batches.

Users are the first dimension of every input. Candidates are a dimension of some inputs and of the
outputs; whether they are scored apart, so that they can be split and padded, is seen from the
engine's own answers when it is warmed (:meth:`ModelSignature.examine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastrec.spec import InputSpec

Arrays = tuple[np.ndarray, ...]
Outputs = dict[str, np.ndarray]
Key = tuple[int, tuple[tuple[int, ...], ...]]
_USERS = "B"
_MOST_KEYS = 1024


class ModelSignature:
    """The inputs of a model version.

    Attributes:
        joins: whether several requests can share a call.
        separable: whether candidates can be split and padded.
        keep: candidates of a user that are scored in full, behind a screen; 0 = all.
    """

    def __init__(self, spec: InputSpec, candidate_symbol: str, keep: int = 0) -> None:
        self.spec, self.keep = spec, keep
        self.names = spec.names
        self.joins = bool(spec.fields) and all(f.dims and f.dims[0] == _USERS for f in spec.fields)
        self._axis = [
            f.dims.index(candidate_symbol) if candidate_symbol in f.dims else None
            for f in spec.fields
        ]
        self._symbol = candidate_symbol
        self._counts = next(
            ((i, axis) for i, axis in enumerate(self._axis) if axis is not None), None
        )
        self.separable = False
        self._keys: dict[tuple[Any, ...], Key] = {}
        # Requests may be larger than a call: the batch is split, candidates where they can be.
        self._unlimited = spec
        # Output name -> its axis of candidates, or None.
        self.output_axis: dict[str, int | None] = {}
        self.outputs: dict[str, tuple[tuple[int | str, ...], str]] = {}

    def size(self, arrays: Arrays) -> tuple[int, int]:
        """Users and candidates (1 where the model has none)."""
        users = arrays[0].shape[0] if self.joins else 1
        if self._counts is None:
            return users, 1
        return users, arrays[self._counts[0]].shape[self._counts[1]]

    def size_of(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int] | None:
        """As :meth:`size`, of the shapes that a message claims by name; None where they are no
        good, which is for :meth:`check` to say."""
        try:
            users = shapes[self.names[0]][0] if self.joins else 1
            if self._counts is None:
                return users, 1
            i, axis = self._counts
            return users, shapes[self.names[i]][axis]
        except (KeyError, IndexError):
            return None

    def deep(self, candidates: int) -> int:
        """Candidates that are scored in full, out of ``candidates``: the unit of cost."""
        return min(candidates, self.keep) if self.keep else candidates

    def most(self, symbol: str) -> int | None:
        """The spec's upper limit of users (``"B"``) or candidates."""
        return self.spec.limits.get(symbol, (1, None))[1]

    def check(self, arrays: Arrays) -> None:
        """Refuse what the engine would, but for the largest batch: that is split.

        Raises:
            FastrecError: the input that is wrong, named.
        """
        self._unlimited.check(arrays)

    def key(self, arrays: Arrays, padded: int) -> Key:
        """Equal for requests that can share a call: ``padded``, the candidates after padding, and
        the shapes of one user."""
        shapes = (padded, *[a.shape for a in arrays])
        known = self._keys.get(shapes)
        if known is None:
            known = (
                padded,
                tuple(
                    a.shape[1:]
                    if axis is None
                    else (*a.shape[1:axis], padded, *a.shape[axis + 1 :])
                    for a, axis in zip(arrays, self._axis, strict=True)
                ),
            )
            if len(self._keys) < _MOST_KEYS:
                self._keys[shapes] = known
        return known

    def slice_users(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """Views of some users."""
        return tuple(a[start:stop] for a in arrays)

    def slice_candidates(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """Views of some candidates, and the rest whole."""
        return tuple(
            a if axis is None else a[(slice(None),) * axis + (slice(start, stop),)]
            for a, axis in zip(arrays, self._axis, strict=True)
        )

    def join(self, parts: Sequence[Arrays], padded: int) -> Arrays:
        """One call's inputs: users one after another, candidates repeated up to ``padded``."""
        padding = [self._pad(arrays, padded) for arrays in parts]
        if len(padding) == 1:
            return padding[0]
        return tuple(np.concatenate(column) for column in zip(*padding, strict=True))

    def _pad(self, arrays: Arrays, padded: int) -> Arrays:
        if self._counts is None or arrays[self._counts[0]].shape[self._counts[1]] == padded:
            return arrays
        # The last candidate again: always a valid id.
        return tuple(
            a
            if axis is None
            else np.take(a, np.minimum(np.arange(padded), a.shape[axis] - 1), axis)
            for a, axis in zip(arrays, self._axis, strict=True)
        )

    def slice_outputs(self, outputs: Outputs, start: int, users: int, candidates: int) -> Outputs:
        """Outputs of one sub-request, without padding.

        Args:
            outputs: of the whole call.
            start: its first user.
            users, candidates: its sizes.
        """
        cut: Outputs = {}
        for name, value in outputs.items():
            part = value[start : start + users]
            axis = self.output_axis.get(name)
            if axis is not None and part.shape[axis] != candidates:
                part = part[(slice(None),) * axis + (slice(0, candidates),)]
            cut[name] = part
        return cut

    def join_outputs(self, parts: Sequence[Sequence[Outputs]]) -> Outputs:
        """Outputs of a request from its parts: user chunks, each of candidate chunks."""
        if len(parts) == 1 and len(parts[0]) == 1:
            return parts[0][0]
        rows: list[Outputs] = []
        for chunk in parts:
            if len(chunk) == 1:
                rows.append(chunk[0])
                continue
            rows.append(
                {
                    name: chunk[0][name]
                    if (axis := self.output_axis.get(name)) is None
                    else np.concatenate([c[name] for c in chunk], axis)
                    for name in chunk[0]
                }
            )
        if len(rows) == 1:
            return rows[0]
        return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}

    def sample(self, users: int, candidates: int | None, seed: int = 0) -> Arrays:
        """Random inputs; zeros where there is no id range."""
        sizes = {_USERS: users}
        if candidates is not None:
            sizes[self._symbol] = candidates
        like = [
            np.zeros(
                [1, *(sizes.get(str(d), 50) if isinstance(d, str) else d for d in f.dims[1:])]
            ).astype(f.dtype)
            for f in self.spec.fields
        ]
        return self.spec.sample(sizes, seed=seed, like=like)

    def examine(self, call: Callable[[Arrays], Outputs]) -> None:
        """Learn from an engine's answers what the outputs are, and what may be joined and split."""
        most = self.most(self._symbol)
        low = self.spec.limits.get(self._symbol, (1, None))[0]
        count = None if self._counts is None else max(low, min(6, most or 6))
        one = self.sample(1, count, seed=1)
        alone = call(one)
        shapes = {name: value.shape for name, value in alone.items()}
        if self.joins and (self.most(_USERS) or 2) > 1:
            two = self.sample(1, count, seed=2)
            both = call(self.join([one, two], count or 1))
            other = call(two)
            self.joins = all(
                both[name].shape[:1] == (2,)
                and _same(both[name][:1], alone[name])
                and _same(both[name][1:], other[name])
                for name in alone
            )
        else:
            self.joins = False
        if count is not None and count // 2 >= max(low, 1):
            half = call(self.slice_candidates(one, 0, count // 2))
            rest = call(self.slice_candidates(one, count // 2, count))
            axes = {
                name: next((i for i, n in enumerate(shape) if n != half[name].shape[i]), None)
                for name, shape in shapes.items()
                if len(shape) == half[name].ndim
            }
            self.output_axis = axes
            self.separable = any(a is not None for a in axes.values()) and all(
                _same(half[name], alone[name])
                if axis is None
                else _same(np.concatenate([half[name], rest[name]], axis), alone[name])
                for name, axis in axes.items()
            )
        larger = {_USERS} if self.joins else set()
        if self.separable:
            larger.add(self._symbol)
        self._unlimited = InputSpec(
            self.spec.fields,
            {
                name: (low, None if name in larger else high)
                for name, (low, high) in self.spec.limits.items()
            },
        )
        self.outputs = {
            name: (
                tuple(
                    _USERS
                    if i == 0 and self.joins
                    else self._symbol
                    if i == self.output_axis.get(name)
                    else n
                    for i, n in enumerate(shapes[name])
                ),
                str(value.dtype),
            )
            for name, value in alone.items()
        }


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to what another order of summation changes in float32 (or a rounded int8 value)."""
    if a.shape != b.shape:
        return False
    scale = float(np.abs(b).max()) if b.size else 0.0
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True))

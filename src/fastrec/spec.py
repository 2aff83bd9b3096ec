"""The inputs that an engine accepts, checked before anything is computed. numpy only.

Hot path: the shapes of a call are looked up in a cache of shapes already found good; then one
comparison covers all ids. A negative int64 read as uint64 is huge, so ``ids >= rows`` also finds
the ids below 0. A NaN would make every score of its request a NaN, which no caller wants to rank.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastrec.errors import ArgumentError, DeviceError, DtypeError, IdRangeError, ShapeError

_CACHED_SHAPES = 64
_CACHED_SIZE = 1 << 16


@dataclass(frozen=True)
class InputField:
    """One input.

    Args:
        name: as in the model's forward.
        dims: a size, or a symbol (``"B"``, ``"L"``) that is the same wherever it appears.
        dtype: numpy's name of it.
        rows: ids are in 0..rows-1 (the table has that many rows); a symbol means values in
            0..size of it, None means any value.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str = "int64"
    rows: int | str | None = None


class _Accepted(NamedTuple):
    """Shapes found good: which inputs are floats, which are ids, and the upper bounds of all ids
    in a row, None where they are too many to keep."""

    floats: tuple[int, ...]
    ids: tuple[int, ...]
    bounds: np.ndarray | None


@dataclass(frozen=True)
class InputSpec:
    """The inputs of a model, in order, with the limits of its symbols (``{"L": (1, 100)}``)."""

    fields: tuple[InputField, ...]
    limits: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    _known: dict[Any, _Accepted] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reverses it."""
        return {
            "fields": [{**dataclasses.asdict(f), "dims": list(f.dims)} for f in self.fields],
            "limits": {name: list(limit) for name, limit in self.limits.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputSpec:
        """Reverse of :meth:`to_dict`."""
        fields = tuple(InputField(**{**f, "dims": tuple(f["dims"])}) for f in values["fields"])
        return cls(fields, {name: (low, high) for name, (low, high) in values["limits"].items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(f.name for f in self.fields)

    def fixed_to(self, shapes: Sequence[Sequence[int]], *, keep: Sequence[str] = ()) -> InputSpec:
        """This spec with every symbol but those in ``keep`` set to its size in ``shapes``."""
        sizes = self.sizes(shapes)
        fields = tuple(
            dataclasses.replace(
                f,
                dims=tuple(d if isinstance(d, int) or d in keep else sizes[d] for d in f.dims),
                rows=sizes[f.rows] + 1
                if isinstance(f.rows, str) and f.rows in sizes and f.rows not in keep
                else f.rows,
            )
            for f in self.fields
        )
        return InputSpec(fields, {k: v for k, v in self.limits.items() if k in keep})

    def sample(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        seed: int = 0,
        like: Sequence[np.ndarray] | None = None,
        full: bool = False,
    ) -> tuple[np.ndarray, ...]:
        """Random inputs that this spec accepts.

        Args:
            sizes: symbol -> size; by default 1 for B, another symbol's upper limit, else 50; never
                below its lower limit.
            seed: of the values.
            like: example inputs; rows of them are drawn for the inputs without an id range.
            full: whether each length is the longest instead of a random one.

        Raises:
            ArgumentError: an input has no id range and there is no example of it.
        """
        rng = np.random.default_rng(seed)
        known = {"B": 1}
        for name, (low, high) in self.limits.items():
            usual = 1 if name == "B" else 50 if high is None else high
            known[name] = max(usual, low)
        known.update(sizes or {})
        drawn = []
        for i, f in enumerate(self.fields):
            shape = tuple(d if isinstance(d, int) else known.get(d, 50) for d in f.dims)
            if f.rows is not None:
                top = known.get(f.rows, 50) + 1 if isinstance(f.rows, str) else f.rows
                low = top - 1 if full and isinstance(f.rows, str) else 0
                drawn.append(rng.integers(low, top, shape, dtype=np.int64))
            elif like is None:
                raise ArgumentError("like", f"an example of {f.name}, which has no id range", None)
            else:
                drawn.append(like[i][rng.integers(0, len(like[i]), shape[0])])
        return tuple(drawn)

    def check(self, inputs: Sequence[Any]) -> tuple[list[np.ndarray], bool]:
        """Check the inputs of one call.

        Returns:
            the inputs as numpy arrays (views), and whether they came as torch tensors.

        Raises:
            ArgumentError: the wrong number of inputs; a NaN in a float one.
            DtypeError: an input is neither array nor tensor, kinds are mixed, or a dtype is wrong.
            DeviceError: a tensor is not in the CPU's memory.
            ShapeError: a rank or size does not fit the spec or the other inputs.
            IdRangeError: an id or length lies outside its range.
        """
        fields = self.fields
        if len(inputs) != len(fields):
            raise ArgumentError("inputs", f"{len(fields)} inputs {self.names}", len(inputs))
        from_torch = not isinstance(inputs[0], np.ndarray)
        if set(map(type, inputs)) == {np.ndarray}:
            arrays = list(inputs)
        else:
            arrays = [
                self._array(f.name, value, from_torch)
                for f, value in zip(fields, inputs, strict=True)
            ]
        # Plain tuples hash fast; dtype objects of native types are singletons.
        key = tuple([(a.shape, a.dtype) for a in arrays])
        known = self._known.get(key)
        if known is None:
            known = self._accept(arrays)
            if len(self._known) < _CACHED_SHAPES:
                self._known[key] = known
        for i in known.floats:
            if np.isnan(arrays[i]).any():
                raise ArgumentError(fields[i].name, "an input of numbers", "a NaN")
        bounds = known.bounds
        if bounds is None:
            self._check_ranges(arrays)
        elif known.ids:
            ids = np.concatenate([arrays[i].reshape(-1) for i in known.ids])
            if (ids.view(np.uint64) >= bounds).any():
                self._check_ranges(arrays)
        return arrays, from_torch

    @staticmethod
    def _array(name: str, value: Any, from_torch: bool) -> np.ndarray:
        if isinstance(value, np.ndarray):
            if from_torch:
                raise DtypeError(name, "a torch tensor, as the first input is", "a numpy array")
            return value
        # An object can only be a tensor where torch has been imported: never import it for that.
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor):
            raise DtypeError(name, "a numpy array or torch tensor", type(value).__name__)
        if not from_torch:
            raise DtypeError(name, "a numpy array, as the first input is", "a torch tensor")
        if not value.is_cpu:
            raise DeviceError(name, "a tensor on the CPU", value.device)
        try:
            array: np.ndarray = (value.detach() if value.requires_grad else value).numpy()
        except TypeError as error:
            raise DtypeError(name, "a dtype that numpy has", value.dtype) from error
        return array

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Symbol -> size in these shapes, one an input.

        Raises:
            ShapeError: a symbol or size does not fit.
        """
        sizes: dict[str, int] = {}
        for f, shape in zip(self.fields, shapes, strict=True):
            expected = [sizes.get(d, d) if isinstance(d, str) else d for d in f.dims]
            fits = len(shape) == len(f.dims) and all(
                isinstance(e, str) or e == s for e, s in zip(expected, shape, strict=True)
            )
            if not fits:
                raise ShapeError(f.name, f"shape {_shown(expected)}", f"shape {list(shape)}")
            for d, size in zip(f.dims, shape, strict=True):
                if isinstance(d, str):
                    low, high = self.limits.get(d, (1, None))
                    if size < low or (high is not None and size > high):
                        wanted = f"{low} or more" if high is None else f"{low}..{high}"
                        raise ShapeError(
                            f.name,
                            f"shape {_shown(f.dims)} with {d} in {wanted}",
                            f"shape {list(shape)}",
                        )
                    sizes[d] = size
        return sizes

    def _accept(self, arrays: Sequence[np.ndarray]) -> _Accepted:
        """Check dtypes and shapes; what is left to check is each call's values."""
        for f, array in zip(self.fields, arrays, strict=True):
            if array.dtype != np.dtype(f.dtype):
                raise DtypeError(f.name, f.dtype, array.dtype)
        sizes = self.sizes([a.shape for a in arrays])
        bounds = [
            np.full(a.size, sizes[f.rows] + 1 if isinstance(f.rows, str) else f.rows, np.uint64)
            for f, a in zip(self.fields, arrays, strict=True)
            if f.rows is not None
        ]
        few = sum(b.size for b in bounds) <= _CACHED_SIZE
        return _Accepted(
            tuple(i for i, a in enumerate(arrays) if a.dtype.kind == "f"),
            tuple(i for i, f in enumerate(self.fields) if f.rows is not None),
            (np.concatenate(bounds) if bounds else np.empty(0, np.uint64)) if few else None,
        )

    def _check_ranges(self, arrays: Sequence[np.ndarray]) -> None:
        sizes = self.sizes([a.shape for a in arrays])
        for f, a in zip(self.fields, arrays, strict=True):
            if f.rows is None or a.size == 0:
                continue
            rows = sizes[f.rows] + 1 if isinstance(f.rows, str) else f.rows
            low, high = int(a.min()), int(a.max())
            if low < 0 or high >= rows:
                kind = "lengths" if f.name == "length" else "ids"
                raise IdRangeError(f.name, f"{kind} in 0..{rows - 1}", low if low < 0 else high)


def _shown(dims: Sequence[int | str]) -> str:
    return f"[{', '.join(str(d) for d in dims)}]"

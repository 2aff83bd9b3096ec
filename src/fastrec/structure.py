"""Inputs and outputs as people write them: lists, dicts, dataclasses and numbers around tensors.

Engines take tensors one after the other and give one float32 tensor. A :class:`Structure` takes a
call's arguments apart into those, and builds the model's result from that one. numpy only, so that
serving can load it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, DtypeError, ShapeError

# Bits of an integer that one float32 holds exactly, and how many floats hold an int64.
BITS, PIECES = 22, 3
_SEQUENCES = {"tuple": tuple, "list": list}
_TAKEN_AS = {
    **dict.fromkeys(("float64", "float16", "bfloat16"), "float32"),
    **dict.fromkeys(("int32", "int16", "int8", "uint8"), "int64"),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor of the arguments.

    Args:
        path: how the caller reaches it, such as ``batch.item``.
        dtype: numpy's name of the dtype that it is given in.
        per_user: rows for each user of the batch, which the engine takes as a second dimension; 0
            where the batch is its first dimension already, or it does not follow the batch.
    """

    path: str
    dtype: str
    per_user: int = 0


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor of the result.

    Args:
        dtype: numpy's name of the dtype that it has in the model.
        shape: its sizes; the first is a multiple of the batch where ``per_user`` is not 0.
        per_user: the first size for each user of the batch; 0 where it does not follow from it.
    """

    dtype: str
    shape: tuple[int, ...]
    per_user: int

    @property
    def floats(self) -> int:
        """Floats that hold it, a user of the batch."""
        count = int(np.prod(self.shape[1:], dtype=np.int64)) * self.per_user
        count = count if self.per_user else int(np.prod(self.shape, dtype=np.int64))
        return count * (PIECES if self.dtype.startswith(("int", "uint")) else 1)


@dataclasses.dataclass
class Structure:
    """How arguments and results look around their tensors.

    Args:
        arguments: ``["list", [..]]`` of the positional ones, then ``["dict", {..}]`` of the named
            ones; inside are ``["tuple", [..]]``, ``["object", {..}]`` (by attribute), ``["value",
            constant]`` and ``["tensor", number]``.
        leaves: the tensors among them, by number.
        result: of the result, in the same form.
        outputs: the tensors of the result, by number.
        packed: whether the engine gives them beside each other, [B, floats], or the one as it is.
    """

    arguments: list[Any]
    leaves: list[Leaf]
    result: list[Any]
    outputs: list[Output]
    packed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reverses it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Structure:
        """Reverse of :meth:`to_dict`."""
        leaves = [Leaf(**leaf) for leaf in values["leaves"]]
        outputs = [Output(**{**o, "shape": tuple(o["shape"])}) for o in values["outputs"]]
        return cls(values["arguments"], leaves, values["result"], outputs, bool(values["packed"]))

    def call(
        self, engine: Callable[..., Any], inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        """The model's result of a call's arguments.

        Args:
            engine: takes the tensors and gives one.
            inputs, named: the arguments.

        Raises:
            ArgumentError, DtypeError, ShapeError: arguments of another structure, or other
                constants.
        """
        return self.built(engine(*self._tensors(list(inputs), named)))

    def tensors(self, request: Any) -> tuple[Any, ...]:
        """The tensors of a request: a tuple of positional arguments, or a dict of named ones.

        Raises:
            ArgumentError, DtypeError: as :meth:`call`.
        """
        if isinstance(request, Mapping):
            return self._tensors([], request)
        return self._tensors(list(request), {})

    def _tensors(self, inputs: list[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        found: dict[int, Any] = {}
        self._match(self.arguments[0], inputs, ("inputs",), found)
        self._match(self.arguments[1], named, ("inputs",), found)
        return tuple(self._as_given(i, found[i]) for i in range(len(self.leaves)))

    def built(self, scores: Any) -> Any:
        """The model's result from what the engine gives."""
        if not self.packed:
            return build(self.result, [_cast(scores, self.outputs[0].dtype)])
        parts, start = [], 0
        for output in self.outputs:
            part = scores[:, start : start + output.floats]
            start += output.floats
            parts.append(_unpacked(part, output))
        return build(self.result, parts)

    def _match(
        self, node: list[Any], value: Any, path: tuple[str, ...], found: dict[int, Any]
    ) -> None:
        kind, inside = node[:2]
        if kind == "tensor":
            found[inside] = value
        elif kind == "value":
            if value != inside or type(value) is not type(inside):
                expected = f"{inside!r}, which the engine was compiled with"
                raise ArgumentError("".join(path), expected, value)
        elif kind in _SEQUENCES:
            if not isinstance(value, list | tuple) or len(value) != len(inside):
                came = len(value) if isinstance(value, list | tuple) else type(value).__name__
                raise ArgumentError("".join(path), f"{len(inside)} values", came)
            for i, (inner, own) in enumerate(zip(inside, value, strict=True)):
                self._match(inner, own, (*path, "[", str(i), "]"), found)
        elif kind == "dict":
            if not isinstance(value, Mapping) or set(value) != set(inside):
                mapping = isinstance(value, Mapping)
                keys = sorted(map(str, value)) if mapping else type(value).__name__
                raise ArgumentError("".join(path), f"the keys {sorted(inside)}", keys)
            for key, inner in inside.items():
                self._match(inner, value[key], (*path, "['", key, "']"), found)
        else:
            for name, inner in inside.items():
                if not hasattr(value, name):
                    came = type(value).__name__
                    raise ArgumentError("".join(path), f"an object with {name}", came)
                self._match(inner, getattr(value, name), (*path, ".", name), found)

    def _as_given(self, number: int, value: Any) -> Any:
        """A tensor in the dtype that the engine takes, if it came in the one that it was compiled
        with."""
        leaf = self.leaves[number]
        dtype = _name(getattr(value, "dtype", type(value).__name__))
        if dtype != leaf.dtype:
            raise DtypeError(leaf.path, leaf.dtype, dtype)
        if dtype in _TAKEN_AS:
            value = _cast(value, _TAKEN_AS[dtype])
        if not leaf.per_user:
            return value
        if not value.shape or value.shape[0] % leaf.per_user:
            expected = f"{leaf.per_user} rows for each user of the batch"
            raise ShapeError(leaf.path, expected, f"shape {list(value.shape)}")
        return value.reshape(-1, leaf.per_user, *value.shape[1:])


def structure_of(header: Mapping[str, Any]) -> Structure | None:
    """The structure that a saved engine's header holds, or None.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    values = header.get("structure")
    return None if values is None else Structure.from_dict(values)


def taken_as(dtype: str) -> str:
    """The dtype that engines take a tensor in."""
    return _TAKEN_AS.get(dtype, dtype)


@functools.lru_cache(maxsize=64)
def _name(dtype: Any) -> str:
    """numpy's name of a dtype of numpy or torch."""
    return str(dtype).removeprefix("torch.")


def build(node: list[Any], tensors: Sequence[Any]) -> Any:
    """A value of a structure around these tensors."""
    kind, inside = node[:2]
    if kind == "tensor":
        return tensors[inside]
    if kind == "value":
        return inside
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](build(inner, tensors) for inner in inside)
    return {key: build(inner, tensors) for key, inner in inside.items()}


def _cast(value: Any, dtype: str) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype(dtype, copy=False)
    torch = sys.modules["torch"]  # the value is a tensor
    return value.to(getattr(torch, dtype))


def _unpacked(part: Any, output: Output) -> Any:
    batch = len(part)
    if output.per_user:
        shape = (batch * output.per_user, *output.shape[1:])
    else:
        part, shape = part[:1], output.shape
    if not output.dtype.startswith(("int", "uint")):
        return _cast(part.reshape(shape), output.dtype)
    pieces = _cast(part.reshape(len(part), -1, PIECES), "int64")
    value = sum(pieces[:, :, i] * 2 ** (BITS * i) for i in range(PIECES))
    return _cast(value.reshape(shape), output.dtype)

"""A model of structured inputs and outputs as one that takes tensors and gives one."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrec.errors import ArgumentError, BackendError, DtypeError, FastrecError
from fastrec.exporters.trace import evaluated, first_line, typed
from fastrec.structure import BITS, Leaf, Output, Structure, taken_as


class Flat(nn.Module):
    """The model behind its tensors.

    Args:
        model: as people wrote it.
        structure: of its arguments and its result.
        arguments: the examples' positional and named ones: their objects are copied for each call.
        batch: of the examples.
        examples: the tensors.
        refused: why the model takes no other batch ("" where it does).
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        arguments: tuple[Any, Any],
        batch: int,
        examples: Sequence[torch.Tensor],
        refused: str,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.refused = refused
        following = [i for i, t in enumerate(examples) if t.ndim and t.shape[0] == batch]
        self.follows = following[0] if following else None
        self.model = model
        self.structure = structure
        self.arguments = arguments
        self.input_names = [leaf.path for leaf in structure.leaves]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The result's tensors beside each other, or the one that there is."""
        given = [
            (tensor.flatten(0, 1) if leaf.per_user else tensor).to(getattr(torch, leaf.dtype))
            for leaf, tensor in zip(self.structure.leaves, tensors, strict=True)
        ]
        args, kwargs = (
            _rebuilt(node, example, given)
            for node, example in zip(self.structure.arguments, self.arguments, strict=True)
        )
        outputs: list[torch.Tensor] = []
        described(self.model(*args, **kwargs), outputs, [], "")
        if not self.structure.packed:
            return outputs[0].float()
        batch = self.batch if self.follows is None else tensors[self.follows].shape[0]
        pairs = zip(self.structure.outputs, outputs, strict=True)
        return torch.cat([_packed(tensor, output, batch) for output, tensor in pairs], 1)


def flattened(
    model: nn.Module, example_inputs: Any
) -> tuple[nn.Module, tuple[torch.Tensor, ...], Structure | None]:
    """The model and its examples as tensors alone.

    Args:
        model: any module.
        example_inputs: the positional arguments of a call, or a dict of the named ones.

    Returns:
        the model itself, its examples and None where they are such tensors already; else a model
        that takes them apart, its tensors, and the structure.

    Raises:
        DtypeError: no tensor among the inputs, or a value that is no tensor, number or container.
        ArgumentError, ShapeError, IdRangeError: the model's forward refuses the examples.
        BackendError: a result that does not follow the batch.
    """
    named = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    tensors: list[torch.Tensor] = []
    paths: list[str] = []
    positional = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional += [f"input_{i}" for i in range(len(positional), len(args))]
    given = [described(v, tensors, paths, n) for n, v in zip(positional, args, strict=False)]
    arguments = [["list", given], described(named, tensors, paths, "")]
    if not tensors:
        raise DtypeError("example_inputs", "tensors or numpy arrays among the inputs", "none")
    calls = [
        _rebuilt(node, value, tensors) for node, value in zip(arguments, (args, named), strict=True)
    ]
    try:
        with torch.inference_mode():
            value = evaluated(model)(*calls[0], **calls[1])
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FastrecError):
            raise
        expected = "inputs that the model's own forward takes"
        raise ArgumentError("example_inputs", expected, first_line(error)) from error
    results: list[torch.Tensor] = []
    result = described(value, results, [], "")
    plain = not named and all(node[0] == "tensor" for node in arguments[0][1])
    plain = plain and isinstance(value, torch.Tensor) and value.is_floating_point()
    batch = next((t.shape[0] for t in tensors if t.ndim), 1)
    plain = plain and all(t.ndim and t.shape[0] == batch for t in tensors)
    plain = plain and all(taken_as(_name(t)) == _name(t) for t in tensors)
    if plain:
        return model, tuple(tensors), None
    if not results:
        raise DtypeError("model", "a model whose result holds tensors", type(value).__name__)

    def run(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        call = [_rebuilt(n, v, given) for n, v in zip(arguments, (args, named), strict=True)]
        found: list[torch.Tensor] = []
        with torch.inference_mode():
            described(evaluated(model)(*call[0], **call[1]), found, [], "")
        return found

    batch, per_user, grown, refused = _grown(tensors, run)
    packed = len(results) > 1 or not results[0].is_floating_point()
    outputs = [_output(t, other, batch) for t, other in zip(results, grown, strict=True)]
    leaves = [
        Leaf(path, _name(t), rows)
        for path, t, rows in zip(_unique(paths), tensors, per_user, strict=True)
    ]
    structure = Structure(arguments, leaves, result, outputs, packed)
    examples = tuple(
        (t.unflatten(0, (batch, rows)) if rows else t).to(getattr(torch, taken_as(_name(t))))
        for t, rows in zip(tensors, per_user, strict=True)
    )
    flat = Flat(model, structure, (list(args), named), batch, examples, refused)
    return flat, examples, structure


def _grown(
    tensors: Sequence[torch.Tensor],
    run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
) -> tuple[int, list[int], list[torch.Tensor], str]:
    """The batch; how many rows for each user a tensor has where that is not one (else 0); the
    results for one more user, or for as many where the model takes no other batch; and why it takes
    no other ("" where it does).

    The batch is the first of the tensors' first sizes that the model takes one more of, if then a
    result has more rows too: a model may read the first of some tables, however many there are.
    """
    sizes = list(dict.fromkeys(t.shape[0] for t in tensors if t.ndim and len(t)))
    ways = []
    for batch in sizes:
        multiples = [
            t.shape[0] // batch if t.ndim and t.shape[0] != batch and t.shape[0] % batch == 0 else 0
            for t in tensors
        ]
        ways += [(batch, [0] * len(tensors)), (batch, multiples)]
    refused = ""
    unchanged: list[tuple[int, list[int], list[torch.Tensor], str]] = []
    shapes = [t.shape for t in run(tensors)]
    for batch, per_user in ways:
        more = []
        for tensor, rows in zip(tensors, per_user, strict=True):
            follows = bool(tensor.ndim) and (tensor.shape[0] == batch or rows > 0)
            more.append(torch.cat([tensor, tensor[: max(rows, 1)]]) if follows else tensor)
        try:
            with typed(f"the model refuses a batch of {batch + 1} in place of {batch}"):
                found = batch, per_user, run(more), ""
        except FastrecError as error:
            refused = refused or str(error)
            continue
        if [t.shape for t in found[2]] != shapes:
            return found
        unchanged.append(found)
    if unchanged and not refused:
        return unchanged[0]
    return (sizes or [1])[0], [0] * len(tensors), run(tensors), refused


def described(value: Any, tensors: list[torch.Tensor], paths: list[str], path: str) -> list[Any]:
    """The structure of a value (see :class:`~fastrec.structure.Structure`); its tensors and where
    they stand are appended.

    Raises:
        DtypeError: a value that is no tensor, number, text, None or container of them.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        paths.append(path)
        return ["tensor", len(tensors) - 1]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    if isinstance(value, Mapping):
        inside = {
            str(key): described(inner, tensors, paths, _below(path, str(key)))
            for key, inner in value.items()
        }
        return ["dict", inside]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [
            kind,
            [described(v, tensors, paths, _below(path, str(i))) for i, v in enumerate(value)],
        ]
    fields = _fields(value)
    if fields is None:
        expected = "tensors, arrays, numbers, None, and lists, dicts or dataclasses of them"
        raise DtypeError(path or "example_inputs", expected, type(value).__name__)
    inside = {
        name: described(getattr(value, name), tensors, paths, _below(path, name)) for name in fields
    }
    return ["object", inside]


def _fields(value: Any) -> list[str] | None:
    """Names of what an object holds: a dataclass's fields, or its attributes."""
    if dataclasses.is_dataclass(value):
        return [f.name for f in dataclasses.fields(value)]
    held = getattr(value, "__dict__", None)
    return None if not held else [name for name in held if not name.startswith("_")]


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unique(paths: Sequence[str]) -> list[str]:
    return [p if paths.count(p) == 1 else f"{p}_{i}" for i, p in enumerate(paths)]


def _rebuilt(node: list[Any], example: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The example with these tensors in place of its own."""
    kind, inside = node[:2]
    if kind == "tensor":
        return tensors[inside]
    if kind == "value":
        return inside
    if kind == "dict":
        # Keys as the example has them, which may be others than text.
        return {
            key: _rebuilt(inner, own, tensors)
            for (key, own), inner in zip(example.items(), inside.values(), strict=True)
        }
    if kind in ("list", "tuple"):
        parts = [_rebuilt(n, e, tensors) for n, e in zip(inside, example, strict=True)]
        if isinstance(example, tuple) and hasattr(example, "_fields"):
            return type(example)(*parts)
        return parts if kind == "list" else tuple(parts)
    copied = object.__new__(type(example))
    copied.__dict__.update(example.__dict__)
    for name, inner in inside.items():
        copied.__dict__[name] = _rebuilt(inner, getattr(example, name), tensors)
    return copied


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _output(tensor: torch.Tensor, grown: torch.Tensor, batch: int) -> Output:
    """A tensor of the result, from it and what it is for one more user."""
    shape, other = tuple(tensor.shape), tuple(grown.shape)
    if tensor.dtype.is_complex:
        raise BackendError("model: a complex result; return torch.view_as_real of it")
    if shape == other:
        return Output(_name(tensor), shape, 0)
    rows = other[0] - shape[0] if shape[1:] == other[1:] else 0
    if rows <= 0 or shape[0] != rows * batch:
        raise BackendError(
            f"model: a result of shape {list(shape)} that is {list(other)} for one user more; put "
            "the batch first"
        )
    return Output(_name(tensor), shape, rows)


def _packed(tensor: torch.Tensor, output: Output, batch: int) -> torch.Tensor:
    """A result's tensor as floats, [B, n]; an integer as pieces that floats hold exactly."""
    if output.per_user:
        rows = tensor.reshape(batch, output.per_user * math.prod(output.shape[1:]))
    else:
        rows = tensor.reshape(1, -1).expand(batch, -1)
    if not output.dtype.startswith(("int", "uint")):
        return rows.float()
    unit = 2**BITS
    whole = rows.long()
    high = torch.div(whole, unit, rounding_mode="floor")
    pieces = [whole - high * unit]
    top = torch.div(high, unit, rounding_mode="floor")
    pieces += [high - top * unit, top]
    return torch.stack(pieces, -1).reshape(rows.shape[0], -1).float()

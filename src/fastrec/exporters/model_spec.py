"""The input spec of a torch model: from its config for fastrec's models, else from examples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrec.errors import ArgumentError, BackendError, DtypeError, ShapeError
from fastrec.exporters.flat import Flat
from fastrec.models import RankerConfig, SASRecConfig
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.spec import InputField, InputSpec

QUANTISED = (SparseInt8Linear, Int8Embedding)


Dims = Mapping[str, Sequence[int | str]]


def spec_of(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    dims: Dims | None = None,
    limits: Mapping[str, int] | None = None,
) -> InputSpec:
    """The spec of a model's inputs.

    For a model with a RankerConfig or SASRecConfig: ids within its tables, lengths in 0..L. For any
    other model: rank, dtype and all sizes but the first (the batch) as in the examples; ``dims``
    names sizes that stay free, such as ``{"item": ("B", "L")}``, and ``limits`` the most of them.

    Raises:
        ArgumentError, ShapeError: ``dims`` names no input, or does not fit the examples; or it is
            given for a model whose config says it.
    """
    config = getattr(model, "config", None)
    if (dims or limits) and isinstance(config, RankerConfig | SASRecConfig):
        raise ArgumentError("dims", "none for a model of fastrec, whose config says them", dims)
    if isinstance(config, RankerConfig):
        history, candidates = ("B", "L"), ("B", "m")
        fields: tuple[InputField, ...] = (
            InputField("item", history, rows=config.n_items),
            InputField("category", history, rows=config.n_categories),
            InputField("behaviour", history, rows=config.n_behaviours + 1),
            InputField("length", ("B",), rows="L"),
            InputField("cand_item", candidates, rows=config.n_items),
            InputField("cand_category", candidates, rows=config.n_categories),
        )
        return InputSpec(fields, {"B": (1, None), "L": (1, config.history_length), "m": (1, None)})
    if isinstance(config, SASRecConfig):
        fields = (
            InputField("item", ("B", "L"), rows=config.n_items),
            InputField("length", ("B",), rows="L"),
        )
        return InputSpec(fields, {"B": (1, None), "L": (1, config.max_length)})
    names = (
        [*model.input_names]
        if isinstance(model, Flat)
        else [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    )
    names += [f"input_{i}" for i in range(len(names), len(example_inputs))]
    batch = next((t.shape[0] for t in example_inputs if t.ndim), 1)
    batch = model.batch if isinstance(model, Flat) else batch
    # How several results follow the batch is not known where the model has shown one batch alone.
    one = model.refused if isinstance(model, Flat) and model.structure.packed else ""
    if one and any("B" in given for given in (dims or {}).values()):
        raise ArgumentError("dims", "fixed sizes for a model that takes one batch", one)
    own = [
        # An input of another first size does not follow the batch.
        InputField(
            name,
            tuple(
                "B" if d == 0 and s == batch and not one else s for d, s in enumerate(tensor.shape)
            ),
            str(tensor.numpy().dtype),
        )
        for name, tensor in zip(names, example_inputs, strict=False)
    ]
    sizes = {"B": batch}
    for name, given in (dims or {}).items():
        if name not in names[: len(own)]:
            raise ArgumentError("dims", f"names of inputs, of {names[: len(own)]}", repr(name))
        at = names.index(name)
        shape = tuple(example_inputs[at].shape)
        fits = len(given) == len(shape)
        for size, actual in zip(given, shape, strict=False):
            known = sizes.setdefault(size, actual) if isinstance(size, str) else size
            fits = fits and known == actual
        if not fits:
            raise ShapeError(
                f"dims[{name!r}]", f"sizes that fit the example's {list(shape)}", tuple(given)
            )
        own[at] = InputField(name, tuple(given), own[at].dtype)
    for size, most in (limits or {}).items():
        if size not in sizes or most < sizes[size]:
            raise ArgumentError(
                "limits", f"of {sorted(sizes)}, at least the examples' {sizes}", {size: most}
            )
    return InputSpec(tuple(own), {s: (1, (limits or {}).get(s)) for s in ("B", *sizes)})


def as_tensors(name: str, inputs: Any) -> tuple[torch.Tensor, ...]:
    """One request as CPU tensors; numpy arrays are copied where they cannot be written to.

    Raises:
        DtypeError: not a tuple or list of tensors or arrays.
    """
    if not isinstance(inputs, tuple | list) or not inputs:
        raise DtypeError(name, "a tuple of tensors or numpy arrays", type(inputs).__name__)
    tensors = []
    for value in inputs:
        if isinstance(value, np.ndarray):
            tensors.append(torch.from_numpy(value if value.flags.writeable else value.copy()))
        elif isinstance(value, torch.Tensor):
            tensors.append(value.detach())
        else:
            raise DtypeError(name, "a tuple of tensors or numpy arrays", type(value).__name__)
        if tensors[-1].ndim == 0:
            raise ArgumentError(name, "inputs with a batch dimension", "a scalar")
    return tuple(tensors)


def quantised_module(model: nn.Module) -> str | None:
    """Name and class of the first module that is quantised already, or None."""
    for name, module in model.named_modules():
        if isinstance(module, QUANTISED):
            return f"{name} ({type(module).__name__})"
    return None


def precision_of(model: nn.Module, wanted: str | None, backend: str) -> tuple[str, str | None]:
    """The precision for ``wanted``, and the quantised module that
    decides it, or None.

    Raises:
        BackendError: a precision is asked for, and the model is quantised already.
    """
    own = quantised_module(model)
    if own is not None and wanted is not None:
        raise BackendError(
            f"{backend}: {own} is quantised already: leave precision at None to run its own int8"
        )
    return wanted or ("fp32" if own is None else "int8"), own

"""Which modules compression touches, and small helpers for swapping them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError, DtypeError

FilterFn = Callable[[nn.Module, str], bool]

# These read `child.weight` directly instead of calling the child, so a swapped child would be
# bypassed (MultiheadAttention) or would break torch's fused path (TransformerEncoderLayer).
_BYPASSING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def check_model(model: Any) -> nn.Module:
    """``model`` itself, or DtypeError where it is no torch module."""
    if not isinstance(model, nn.Module):
        raise DtypeError("model", "a torch.nn.Module", type(model).__name__)
    return model


def check_filter(filter_fn: FilterFn | None) -> None:
    """DtypeError where ``filter_fn`` is given and cannot be called."""
    if filter_fn is not None and not callable(filter_fn):
        raise DtypeError("filter_fn", "a callable (module, name) -> bool", type(filter_fn).__name__)


def bypassed_children(model: nn.Module) -> set[int]:
    """ids of modules whose parent uses their weight without calling them."""
    return {
        id(child)
        for parent in model.modules()
        if isinstance(parent, _BYPASSING_PARENTS)
        for child in parent.modules()
        if child is not parent
    }


def named_layers(
    model: nn.Module, kind: type[nn.Module], filter_fn: FilterFn
) -> Iterator[tuple[str, nn.Module]]:
    """Modules that compute what ``kind`` computes (a subclass with its own forward is another
    layer), each once, in the order of the tree."""
    for name, module in model.named_modules():
        computes_it = isinstance(module, kind) and type(module).forward is kind.forward
        if computes_it and filter_fn(module, name):
            yield name, module


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` wherever the submodule ``name`` is found in the tree; children keep their
    order."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """id(module) -> every name under which it is reachable (a shared module has several)."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on one batch: a ``SequenceBatch`` (its ``.inputs()``), tuple, mapping or
    tensor."""
    if hasattr(batch, "inputs") and callable(batch.inputs):
        batch = batch.inputs()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{name: _tensor(value, device) for name, value in batch.items()})
    if isinstance(batch, tuple | list):
        return model(*(_tensor(value, device) for value in batch))
    return model(_tensor(batch, device))


def _tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if hasattr(value, "__array__"):
        return torch.as_tensor(value).to(device)
    return value


def check_fraction(argument: str, value: Any, *, low: float = 0.0, high: float = 1.0) -> None:
    """ArgumentError unless ``low <= value < high``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value < high:
        raise ArgumentError(argument, f"a number in [{low:g}, {high:g})", repr(value))


def check_count(argument: str, value: Any, *, low: int = 1) -> None:
    """ArgumentError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ArgumentError(argument, f"an integer >= {low}", repr(value))

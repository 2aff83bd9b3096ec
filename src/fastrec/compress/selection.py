"""Which modules compression touches, and small helpers for swapping them in place."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import MultiheadAttention, WindowSparseAttention
from fastrec.train.checkpoint import unwrapped

FilterFn = Callable[[nn.Module, str], bool]
Names = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
Layers = FilterFn | Names
"""Which layers: a function, or names and compiled regular expressions (see :func:`as_filter`)."""

# These read `child.weight` directly instead of calling the child, so a swapped child would be
# bypassed (MultiheadAttention) or would break torch's fused path (TransformerEncoderLayer).
_BYPASSING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def check_model(model: Any) -> nn.Module:
    """``model`` without its wrappers (see :func:`unwrapped`).

    Raises:
        DtypeError: it is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError("model", "a torch.nn.Module", type(model).__name__)
    return unwrapped(model)


def as_filter(model: nn.Module, chosen: Any, can: Callable[[nn.Module], bool]) -> FilterFn | None:
    """``chosen`` as a filter function; None stays None.

    Args:
        model: whose layers are chosen from.
        chosen: a filter function; or the name of a layer (or of a module: all layers inside), a
            compiled regular expression that matches layers' full names, or several of these.
        can: which modules are layers of the kind.

    Raises:
        DtypeError: something else.
        ArgumentError: a name or expression that no layer has.
    """
    if chosen is None or (callable(chosen) and not isinstance(chosen, nn.Module)):
        return chosen
    parts = [chosen] if isinstance(chosen, str | re.Pattern) else chosen
    if not isinstance(parts, Iterable) or not all(isinstance(p, str | re.Pattern) for p in parts):
        raise DtypeError(
            "filter_fn",
            "a callable (module, name) -> bool, layer names or compiled regular expressions",
            type(chosen).__name__,
        )
    parts = list(parts)
    names = [name for name, m in model.named_modules(remove_duplicate=False) if can(m)]
    for part in parts:
        if not any(_matches(part, name) for name in names):
            raise ArgumentError("filter_fn", _expected(model, part, names), _shown(part))
    return lambda module, name: any(_matches(part, name) for part in parts)


def _matches(part: str | re.Pattern[str], name: str) -> bool:
    if isinstance(part, re.Pattern):
        return part.fullmatch(name) is not None
    return name == part or name.startswith(f"{part}.")


def _shown(part: str | re.Pattern[str]) -> str:
    return repr(part) if isinstance(part, str) else f"the expression {part.pattern!r}"


def _expected(model: nn.Module, part: str | re.Pattern[str], names: list[str]) -> str:
    if isinstance(part, str) and part in dict(model.named_modules()):
        return "a module that is, or holds, a layer that can be changed"
    near = difflib.get_close_matches(str(part), names, n=3, cutoff=0.3) or names[:3]
    return f"the name of a layer, such as {', '.join(map(repr, near))}" if near else "no name"


def bypassed_children(model: nn.Module) -> set[int]:
    """ids of modules whose parent uses their weight without calling them.

    An encoder layer calls all of its modules once its attention is one of fastrec's.
    """
    return {
        id(child)
        for parent in model.modules()
        if isinstance(parent, _BYPASSING_PARENTS)
        and not isinstance(
            getattr(parent, "self_attn", None), MultiheadAttention | WindowSparseAttention
        )
        for child in parent.modules()
        if child is not parent
    }


def is_table(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``nn.Embedding`` does."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def named_layers(
    model: nn.Module, can: Callable[[nn.Module], bool], filter_fn: FilterFn
) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the kind that ``can`` tells and ``filter_fn`` selects, each once, in the order of
    the tree."""
    for name, module in model.named_modules():
        if can(module) and filter_fn(module, name):
            yield name, module


def reasons(left: Mapping[str, str]) -> str:
    """Why layers are left as they are, as one line; empty for none."""
    return "; ".join(f"{name}: {why}" for name, why in left.items())


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
    """Run ``model`` on a batch: a ``SequenceBatch`` (its ``.inputs()``), tuple, mapping or tensor.

    Raises:
        ArgumentError: the batch does not fit the signature of ``model.forward``.
    """
    if hasattr(batch, "inputs") and callable(batch.inputs):
        batch = batch.inputs()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {name: _tensor(value, device) for name, value in batch.items()}
    else:
        values = batch if isinstance(batch, tuple | list) else (batch,)
        args = [_tensor(value, device) for value in values]
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as misfit:
            raise ArgumentError(
                "batch", f"the inputs of {type(model).__name__}.forward{signature}", misfit
            ) from error
        raise


def _tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if hasattr(value, "__array__"):
        return torch.as_tensor(value).to(device)
    return value


def check_fraction(argument: str, value: Any, *, low: float = 0.0, high: float = 1.0) -> None:
    """ArgumentError unless ``low <= value < high``.

    Args:
        argument: its name, for the message.
        value: what was passed.
        low: the smallest value allowed.
        high: the first value that is too large.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value < high:
        raise ArgumentError(argument, f"a number in [{low:g}, {high:g})", repr(value))


def check_count(argument: str, value: Any, *, low: int = 1) -> None:
    """ArgumentError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ArgumentError(argument, f"an integer >= {low}", repr(value))

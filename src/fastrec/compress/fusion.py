"""Which activations are fused into quantised linear layers, and which layers output uint8."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn

from fastrec.compress.layers import swap_obstacle
from fastrec.compress.selection import all_names
from fastrec.compress.take_apart import ENCODER_LAYERS
from fastrec.nn import LowRankLinear


@dataclass(frozen=True)
class Fusion:
    """Modules that one quantised linear layer absorbs.

    Args:
        activation: "relu", "gelu" or None.
        absorbed: names of the modules that become nn.Identity (the activation, and dropouts on the
            way to ``consumer``, which do nothing at inference).
        consumer: name of the quantised layer that alone reads the result, or None.
    """

    activation: str | None = None
    absorbed: tuple[str, ...] = ()
    consumer: str | None = None


def activation_name(module: nn.Module) -> str | None:
    """ "relu" or "gelu" where the kernel computes exactly this module, else None."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return None


def plan_fusions(
    model: nn.Module,
    linears: Collection[str],
    runs_whole: Callable[[str, list[str]], bool],
) -> Mapping[str, Fusion]:
    """The fusions inside every ``nn.Sequential`` and ``LowRankLinear`` of ``model``, and in the
    feed-forward part of torch's encoder and decoder layers.

    Only there is it certain that an output has a single reader; a module that appears twice in the
    tree or a Sequential whose layers are also called one by one is left alone.

    Args:
        model: the model, still with its float layers.
        linears: names of the layers to be quantised.
        runs_whole: (name of the Sequential, names of its layers) -> whether it is only ever called
            as a whole.
    """
    names = all_names(model)
    single = {name for found in names.values() if len(found) == 1 for name in found}
    fusions: dict[str, Fusion] = {}
    # Inner chains first: an outer chain sees further, so its answer overwrites theirs.
    for prefix, parent in reversed(list(model.named_modules())):
        if _is_chain(parent):
            children = _links(prefix, parent)
        elif (layer := _encoder_layer(parent)) is not None:
            parts = ("linear1", "activation", "dropout", "linear2")
            children = {f"{prefix}.{part}".lstrip("."): getattr(layer, part) for part in parts}
        else:
            continue
        if not runs_whole(prefix, [name for name in children if name in linears]):
            continue
        order = list(children)
        for position, name in enumerate(order):
            if name in linears and name in single:
                fusions[name] = _fuse(order[position + 1 :], children, linears, single)
    return fusions


def _is_chain(module: nn.Module) -> bool:
    kinds = (nn.Sequential, LowRankLinear)
    return any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)


def _encoder_layer(module: nn.Module) -> nn.Module | None:
    """The module where it is an encoder or decoder layer that computes what torch's does."""
    for kind in ENCODER_LAYERS:
        own = isinstance(module, kind) and isinstance(module.activation, nn.Module)
        if own and all(
            getattr(type(module), f) is getattr(kind, f) for f in ("forward", "_ff_block")
        ):
            return module
    return None


def _links(prefix: str, parent: nn.Module) -> dict[str, nn.Module]:
    """The modules of a chain in call order, inner chains flattened."""
    links: dict[str, nn.Module] = {}
    # _modules, because named_children() skips a module that comes a second time
    for key, child in parent._modules.items():
        name = f"{prefix}.{key}".lstrip(".")
        if child is not None and _is_chain(child):
            links |= _links(name, child)
        elif child is not None:
            links[name] = child
    return links


def _fuse(
    following: list[str],
    children: Mapping[str, nn.Module],
    linears: Collection[str],
    single: Collection[str],
) -> Fusion:
    activation: str | None = None
    absorbed: list[str] = []
    for name in following:
        module = children[name]
        if name in linears:
            consumer = name if name in single else None
            return Fusion(activation, tuple(absorbed), consumer)
        if name not in single or swap_obstacle(module) is not None:
            break
        if isinstance(module, nn.Identity | nn.Dropout):
            absorbed.append(name)
        elif activation is None and activation_name(module):
            activation = activation_name(module)
            absorbed.append(name)
        else:
            break
    return Fusion(activation, tuple(absorbed))

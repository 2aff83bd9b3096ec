"""Which layers and tables ``quantize_`` takes, and why the others stay float."""

from __future__ import annotations

import torch
from torch import nn

from fastrec.compress.layers import (
    KINDS,
    computes_linear,
    swap_obstacle,
    weight_obstacle,
    weight_of,
)
from fastrec.compress.selection import (
    FilterFn,
    bypassed_children,
    is_table,
    named_layers,
    reasons,
)
from fastrec.errors import ArgumentError, DtypeError

MIN_OUTPUTS = 16  # narrower layers (a final score) save no time and would lose accuracy
MIN_TABLE_ROWS = 1000  # smaller tables (positions, behaviours) save no bytes and add a step
_FLOAT_ONLY = (
    nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag,
)  # fmt: skip


def default_filter(module: nn.Module, name: str) -> bool:
    """Layers of at least ``MIN_OUTPUTS`` outputs and tables of at least ``MIN_TABLE_ROWS`` rows."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings >= MIN_TABLE_ROWS
    return module.out_features >= MIN_OUTPUTS


def selected(
    model: nn.Module, embeddings: bool, filter_fn: FilterFn, *, trains: bool = False
) -> tuple[dict[str, nn.Module], dict[str, nn.Embedding]]:
    """The linear layers and tables to quantise, by name.

    Args:
        model: any torch model.
        embeddings: whether tables are taken too.
        filter_fn: which layers and tables.
        trains: whether the weights will be trained behind fake quantisation.

    Raises:
        ArgumentError: nothing is selected, or a weight is not finite.
        DtypeError: a selected layer that is not float32.
    """
    left = unsupported(model, embeddings, trains=trains)
    linears = {
        name: m for name, m in named_layers(model, computes_linear, filter_fn) if name not in left
    }
    tables = {
        name: m
        for name, m in (named_layers(model, is_table, filter_fn) if embeddings else ())
        if isinstance(m, nn.Embedding) and name not in left
    }
    if not linears and not tables:
        raise ArgumentError(
            "model",
            f"a module holding nn.Linear layers (by default of at least {MIN_OUTPUTS} outputs) or "
            "tables that filter_fn selects",
            reasons(left) or "none",
        )
    if "" in linears or "" in tables:
        raise ArgumentError(
            "model", "a module that holds the layers: wrap it in nn.Sequential", "a single layer"
        )
    for name, layer in {**linears, **tables}.items():
        check_float32(name, layer)
        check_finite(name, layer)
    return linears, tables


def unsupported(model: nn.Module, embeddings: bool, *, trains: bool = False) -> dict[str, str]:
    """Layers with weights that have no INT8 form here, by name, with the reason.

    Args:
        model: any torch model.
        embeddings: whether tables count too.
        trains: whether the weights will be trained behind fake quantisation.
    """
    bypassed = bypassed_children(model)
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            left[name] = (
                "torch's attention with add_bias_kv, add_zero_attn, hooks or no plain weights"
            )
        elif isinstance(module, _FLOAT_ONLY):
            left[name] = f"{type(module).__name__} has no INT8 form"
        elif isinstance(module, KINDS) or (embeddings and isinstance(module, nn.Embedding)):
            why = _obstacle(module, id(module) in bypassed, trains)
            if why is not None:
                left[name] = why
    return left


def _obstacle(layer: nn.Module, bypassed: bool, trains: bool) -> str | None:
    """Why a linear layer or table stays float, or None."""
    kind = next(k for k in (*KINDS, nn.Embedding) if isinstance(layer, k))
    if bypassed:
        return "its parent reads its weight without calling it"
    if not (computes_linear(layer) or is_table(layer)):
        return f"{type(layer).__name__} computes something else than {kind.__name__}"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm changes the table while it is read"
    why = weight_obstacle(layer) if trains else None
    return why or swap_obstacle(layer)


def check_float32(name: str, layer: nn.Module) -> None:
    """DtypeError for a layer whose INT8 form would hand on another dtype than it does."""
    if weight_of(layer).dtype != torch.float32:
        raise DtypeError(
            "model",
            "float32 layers: model.float(), or leave the others out with filter_fn",
            f"{str(weight_of(layer).dtype).removeprefix('torch.')} in {name!r}",
        )


def check_finite(name: str, layer: nn.Module) -> None:
    """ArgumentError for NaN or infinity in a layer's parameters."""
    for key, parameter in layer.named_parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ArgumentError(f"{name}.{key}", "finite weights", "NaN or infinity")

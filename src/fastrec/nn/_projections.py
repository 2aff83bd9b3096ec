"""The four ways in which an attention or a feed-forward part may project its channels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastrec.nn.grouped_linear import GroupedLinear
from fastrec.nn.low_rank_linear import LowRankLinear
from fastrec.nn.separable_projection import SeparableProjection

Projection = Literal["dense", "grouped", "separable", "low_rank"]
PROJECTIONS = ("dense", "grouped", "separable", "low_rank")


def make_projection(
    kind: Projection,
    inputs: int,
    outputs: int,
    *,
    groups: int = 1,
    kernel_size: int = 3,
    rank: int | None = None,
    causal: bool = False,
    shuffle: bool = False,
    **like_torch: Any,
) -> nn.Module:
    """The module of a kind.

    Args:
        kind: one of :data:`PROJECTIONS`.
        inputs, outputs: channels.
        groups: of "grouped" and "separable".
        kernel_size, causal: of "separable".
        rank: of "low_rank".
        shuffle: of "grouped".
        like_torch: bias, device and dtype.
    """
    if kind == "grouped":
        return GroupedLinear(inputs, outputs, groups, shuffle=shuffle, **like_torch)
    if kind == "separable":
        return SeparableProjection(
            inputs, outputs, kernel_size, groups, causal=causal, **like_torch
        )
    if kind == "low_rank":
        assert rank is not None
        return LowRankLinear(inputs, outputs, rank, **like_torch)
    return nn.Linear(inputs, outputs, **like_torch)


def project(layer: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    """``layer(x)``, with the lengths for one that looks at neighbours."""
    takes_lengths = getattr(layer, "takes_lengths", False)
    result: Tensor = layer(x, lengths) if takes_lengths else layer(x)
    return result


def output_layer(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias whose scale is the output's."""
    if isinstance(layer, LowRankLinear):
        return layer.up.weight, layer.up.bias
    if isinstance(layer, SeparableProjection):
        return layer.pointwise, layer.bias
    assert isinstance(layer, nn.Linear | GroupedLinear)
    return layer.weight, layer.bias


def load_dense(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Become a dense weight [outputs, inputs] and its bias, or what is nearest to it."""
    if isinstance(layer, nn.Linear):
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
    else:
        assert isinstance(layer, GroupedLinear | SeparableProjection | LowRankLinear)
        layer.load_dense(weight, bias)

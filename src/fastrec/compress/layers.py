"""The layers that compression reaches into, and one view of their weights: rows of outputs.

| layer | rows of outputs [N, K] | dense form |
|---|---|---|
| ``nn.Linear`` | its weight | its weight |
| ``GroupedLinear`` | the groups' rows, K inputs of one group | block-diagonal, shuffled if it is |
| ``SeparableProjection`` | likewise, of the projection behind its taps | block-diagonal |

``LowRankLinear`` is two ``nn.Linear`` and needs no row of its own. ``nn.MultiheadAttention`` is
pruned as one layer [3d, d], and taken apart for INT8 (``take_apart.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastrec.nn import GroupedLinear, SeparableProjection

Layer = nn.Linear | GroupedLinear | SeparableProjection
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, GroupedLinear, SeparableProjection)


def computes_linear(module: nn.Module) -> bool:
    """Whether ``module`` is one of ``KINDS``; a subclass with its own forward is another layer."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in KINDS)


def weight_name(layer: nn.Module) -> str:
    """The attribute that holds the projection's weight."""
    if isinstance(layer, nn.MultiheadAttention):
        return "in_proj_weight"
    return "pointwise" if isinstance(layer, SeparableProjection) else "weight"


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The projection's weight, [N, K] or [G, N / G, K / G]."""
    weight: nn.Parameter = getattr(layer, weight_name(layer))
    return weight


def weight_obstacle(layer: nn.Module) -> str | None:
    """Why the layer's weight cannot be changed in place, or trained by a fake-quantised twin."""
    weight = layer._parameters.get(weight_name(layer))
    if weight is None:
        return (
            "its weight is computed from other parameters (weight_norm, spectral_norm, orthogonal, "
            "torch's prune): make it plain first, e.g. parametrize.remove_parametrizations"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet: run a batch first"
    if weight.is_inference():
        return "its weight was made under torch.inference_mode, which forbids changes"
    if any(
        step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        return "elements of its weight share memory (expand): clone it first"
    return None


def swap_obstacle(module: nn.Module) -> str | None:
    """Why no other module can take its place; the hooks that maintain a re-parametrised weight are
    no obstacle."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, and another module would not have it"
    hooks = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks,
        module._backward_hooks,
    )  # fmt: skip
    for hook in [hook for kind in hooks for hook in kind.values()]:
        made_in = getattr(hook, "__module__", None) or type(hook).__module__
        if not made_in.startswith(("torch.nn.utils.", "fastrec.")):
            return "it has hooks, which another module would not have"
    return None


def block_within_groups(weight: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    """``block``, or the tallest of its divisors whose blocks never straddle two groups."""
    return (math.gcd(weight.shape[1], block[0]), block[1]) if weight.dim() == 3 else block


def as_dense(layer: nn.Module, weight: Tensor | None = None) -> nn.Linear:
    """The ``nn.Linear`` [N, K] with the same products, detached; for packing and reference.

    Args:
        layer: one of ``KINDS``; of a separable projection, what follows its taps.
        weight: in place of the layer's own, of its shape.
    """
    weight = (weight_of(layer) if weight is None else weight).detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if weight.dim() == 3:
        order = output_order(layer)
        weight = torch.block_diag(*weight)
        if order is not None:
            weight = weight[order]
            bias = None if bias is None else bias[order]
    outputs, inputs = weight.shape
    dense = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return dense.train(layer.training)


def output_order(layer: nn.Module) -> Tensor | None:
    """int64 [N]: the row of outputs that each output channel comes from; None: its own."""
    if not getattr(layer, "shuffle", False):
        return None
    groups, outputs, _ = layer.weight.shape
    return torch.arange(groups * outputs, device=layer.weight.device).view(groups, -1).T.flatten()

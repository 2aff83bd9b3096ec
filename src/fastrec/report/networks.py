"""The float32 torch model that each variant is checked against, and its parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastrec.nn import Int8Embedding, SparseInt8Linear

_ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


def float_reference(model: nn.Module) -> nn.Module:
    """The float32 torch model that a variant stands for.

    INT8 layers and tables become plain torch ones with the dequantised weights, so that what is
    left between the two is the rounding of activations and the kernels themselves.
    """
    reference = copy.deepcopy(model).float().eval()
    for name, module in list(reference.named_modules()):
        if isinstance(module, SparseInt8Linear):
            _replace(reference, name, _linear(module))
        elif isinstance(module, Int8Embedding):
            weight = module.weight.float() * module.scale[:, None]
            _replace(reference, name, nn.Embedding.from_pretrained(weight))
    return reference.eval()


def _linear(module: SparseInt8Linear) -> nn.Module:
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(module.dequantized_weight())
        if module.bias is not None:
            linear.bias.copy_(module.bias)
    if module.activation is None:
        return linear
    return nn.Sequential(linear, _ACTIVATIONS[module.activation]())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters, those that are not zero) of a model; INT8 layers count as their float ones."""
    tensors = [p.detach() for p in float_reference(model).parameters()]
    return sum(t.numel() for t in tensors), sum(int(t.count_nonzero()) for t in tensors)

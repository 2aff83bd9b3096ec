"""Modules of torch taken apart, so that compression reaches the linear layers in them.

``nn.MultiheadAttention`` becomes :class:`fastrec.nn.MultiheadAttention`, a convolution of kernel 1
:class:`fastrec.nn.PointwiseConv`, and the activation of an encoder or decoder layer, a function, a
module that INT8 can fuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from fastrec.compress.layers import swap_obstacle
from fastrec.compress.selection import set_module
from fastrec.nn import MultiheadAttention, PointwiseConv
from fastrec.nn.pointwise_conv import is_pointwise

# Layers whose feed-forward part is linear1, activation, dropout, linear2. They, and the stacks of
# them, may read the weights of all modules inside for one fused call.
ENCODER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_READERS = (*ENCODER_LAYERS, nn.TransformerEncoder, nn.TransformerDecoder)
_ACTIVATIONS: dict[object, Callable[[], nn.Module]] = {F.relu: nn.ReLU, F.gelu: nn.GELU}


class TakenApart:
    """The modules that :func:`take_apart_` replaced in a model, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.activations: dict[str, object] = {}

    def put_back(self, keep: Callable[[nn.Module], bool] = lambda module: False) -> None:
        """Put torch's modules back where ``keep`` holds of no part of them, nor of the stack of
        encoder layers around."""
        for name, activation in list(self.activations.items()):
            if not self._keeps(name, keep):
                layer = self.model.get_submodule(name)
                del layer.activation
                layer.activation = activation
                del self.activations[name]
        for name, module in list(self.modules.items()):
            if not self._keeps(name, keep):
                set_module(self.model, name, module)
                del self.modules[name]

    def _keeps(self, name: str, keep: Callable[[nn.Module], bool]) -> bool:
        parts = name.split(".") if name else []
        around = [self.model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
        readers = [module for module in around if isinstance(module, _READERS)]
        return any(map(keep, (readers or around[-1:])[0].modules()))


def take_apart_(model: nn.Module) -> TakenApart:
    """Take the modules of a model apart, in place; results stay the same.

    Attention with ``add_bias_kv`` or ``add_zero_attn``, and what has hooks or weights computed from
    others, stays.
    """
    apart = TakenApart(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.MultiheadAttention and name and _can(module):
            apart.modules[name] = module
            set_module(model, name, MultiheadAttention.from_float(module))
        elif is_pointwise(module) and name and _is_plain(module, "weight"):
            assert isinstance(module, nn.Conv1d | nn.Conv2d)
            apart.modules[name] = module
            set_module(model, name, PointwiseConv.from_float(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, ENCODER_LAYERS):
            activation = module.__dict__.get("activation")
            if name_activation_(module):
                apart.activations[name] = activation
    return apart


def name_activation_(layer: nn.Module) -> bool:
    """Make a module of an encoder layer's ReLU or GELU where that is a function."""
    made = _ACTIVATIONS.get(layer.__dict__.get("activation"))
    if made is not None:
        layer.activation = made()
    return made is not None


def _can(mha: nn.MultiheadAttention) -> bool:
    if mha.bias_k is not None or mha.add_zero_attn:
        return False
    if mha._qkv_same_embed_dim:
        own = _is_plain(mha, "in_proj_weight")
    else:
        own = _is_plain(mha, "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return own and _is_plain(mha.out_proj, "weight")


def _is_plain(module: nn.Module, *weights: str) -> bool:
    """Whether another module can take its place, and holds these weights as parameters."""
    own = all(module._parameters.get(name) is not None for name in weights)
    return own and swap_obstacle(module) is None

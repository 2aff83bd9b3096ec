"""Attention whose scores and weighted sums are integers: what ``Int8(attention=True)`` changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fastrec.compress.layers import swap_obstacle
from fastrec.compress.selection import set_module
from fastrec.models.attention import MIDDLE, Attention, SelfAttention
from fastrec.nn import SparseInt8Linear, WindowSparseAttention, WindowSparseInt8Attention

Attending = WindowSparseAttention | Attention


def can_attend_in_int8(module: nn.Module) -> bool:
    """Whether an integer form is known, for some projections at least."""
    return type(module) is WindowSparseAttention or isinstance(module, Attention)


def why_not(module: Attending, int8_layers: Iterable[nn.Module]) -> str | None:
    """Why the scores of ``module`` stay floats, where ``int8_layers`` will become INT8."""
    if (obstacle := swap_obstacle(module)) is not None:
        return obstacle
    if not isinstance(module, Attention):
        return None
    if isinstance(module, SelfAttention) and module.qk_dim != module.head_dim:
        return "heads of q and k are narrower than v's"
    known = set(map(id, int8_layers))
    if not all(id(layer) in known for layer, _ in module.projections()):
        return "q, k and v do not all come from an INT8 layer of one matrix"
    return None


def attend_in_int8(model: nn.Module, steps: Mapping[str, Sequence[float]]) -> None:
    """Turn the named attentions, whose projections are INT8 by now, into those of integers.

    ``steps``: of q and k of a ``WindowSparseAttention``, of q, k and v of the others.
    """
    for name, found in steps.items():
        old = model.get_submodule(name)
        if isinstance(old, Attention):
            _in_bytes(old, found)
        else:
            assert isinstance(old, WindowSparseAttention)
            set_module(model, name, WindowSparseInt8Attention.from_attention(old, *found))


def _in_bytes(attention: Attention, steps: Sequence[float]) -> None:
    """The projections divide by the steps, each row by its own, and round: nothing is rounded
    twice, and no float of q, k or v is ever stored."""
    for layer, parts in attention.projections():
        assert isinstance(layer, SparseInt8Linear)
        width = layer.out_features // len(parts)
        factor = torch.cat([torch.full((width,), 1.0 / steps[part]) for part in parts])
        layer.w_scale = layer.w_scale * factor
        layer.bias = None if layer.bias is None else layer.bias * factor
        layer.set_output_quantization(1.0, MIDDLE)
    out = attention.out_proj
    takes_bytes = isinstance(out, SparseInt8Linear)
    quantisation = (float(out.x_scale), int(out.x_zero_point)) if takes_bytes else None
    attention.attend_in_int8(steps, quantisation)

"""Models in 16 bits: a plan in float32, whose linear layers multiply bfloat16 where the CPU does.

A bfloat16 is a float32 whose lower half is zero, so widening the weights changes nothing. Between
layers activations stay float32: nearer to the exact answer than torch, which rounds them all.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastrec.runtime.native.ir import Plan
from fastrec.runtime.native.merge import FEW_OUTPUTS

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def half_of(model: nn.Module) -> str | None:
    """``bf16`` or ``fp16`` where all float parameters and buffers are that, else None."""
    found = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return _NAMES.get(found.pop()) if len(found) == 1 else None


def widened(model: nn.Module) -> nn.Module:
    """A copy in float32."""
    return copy.deepcopy(model).float()


def multiply_bf16(plan: Plan) -> None:
    """Float linear layers become ``linear_bf16``; those of few outputs are dot products anyway."""
    for step in plan.steps:
        outputs = step.inputs[1].shape[0].coefficient if step.kind == "linear" else 0
        if outputs > FEW_OUTPUTS:
            step.kind = "linear_bf16"

"""Models in 16 bits: a float32 program, whose linear layers multiply bfloat16 where the CPU does.

A bfloat16 is a float32 whose lower half is zero, so widening the weights changes nothing. Between
layers activations stay float32: nearer to the exact answer than torch, which rounds them all.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastrec.runtime.native.passes.merge_linears import FEW_OUTPUTS
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_of(model: nn.Module) -> str | None:
    """``bf16`` or ``fp16`` where all float parameters and buffers are that, else None."""
    found = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return _NAMES.get(found.pop()) if len(found) == 1 else None


def widened(model: nn.Module) -> nn.Module:
    """A copy in float32."""
    return copy.deepcopy(model).float()


def multiply_bf16(program: Program) -> None:
    """Float linear layers become ``linear_bf16``; those of few outputs stay dot products."""
    for position, step in enumerate(program.steps):
        if step.kind == "linear" and step.weight.shape[0].coefficient > FEW_OUTPUTS:
            made = Step("linear_bf16", step.operands, step.fields, step.module)
            program.steps[position] = made

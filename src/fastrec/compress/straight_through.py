"""Rounding in the forward pass, straight through in the backward one, in few passes over memory.

torch's own fake quantisation also writes a mask of what saturates, and multiplies by it as bool,
which is a conversion first: with it a masked, fake-quantised step of the canonical ranker took 1.6
times the dense step's time (``bench/finetune_step.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrec.compress.observers import LEVELS


class _RoundInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        step, zero = float(scale), int(zero_point)
        ctx.save_for_backward(x)
        # Values that round to a level pass their gradient: half a step beyond the last levels, plus
        # the rounding of the bounds themselves.
        half = 0.5 + 1e-4
        ctx.bounds = (-(zero + half) * step, (LEVELS - zero + half) * step)
        return torch.mul(x, float(1 / scale)).round_().clamp_(-zero, LEVELS - zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        gradient = torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.bounds)
        return gradient, None, None


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, dropped: Tensor | None) -> Tensor:
        ctx.dropped = dropped
        column = scale[:, None]
        return torch.div(rows, column).round_().mul_(column)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0]
        if ctx.dropped is not None:
            gradient = gradient.masked_fill(ctx.dropped, 0.0)
        return gradient, None, None


def round_input(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``x`` float32 of any shape on its 256 levels; gradients stop where it saturates.

    Args:
        scale, zero_point: f32 and i32 scalars.
    """
    if not x.is_cpu or torch.compiler.is_compiling() or not torch.isfinite(scale):
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, LEVELS)
    rounded: Tensor = _RoundInput.apply(x, scale, zero_point)
    return rounded


def round_weight(rows: Tensor, scale: Tensor, dropped: Tensor | None) -> Tensor:
    """``rows`` [N, K] rounded to the 255 levels of their scales [N]; nothing saturates.

    Args:
        dropped: bool [N, K], pruned elements: zero in ``rows`` already, and without gradient.
    """
    rounded: Tensor = _RoundWeight.apply(rows, scale, dropped)
    return rounded

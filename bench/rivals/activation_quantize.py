"""Rivals of ``activation_quantize``: torch in steps, and torch.compile of the steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rivals._common import Call, compiled, named


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, activation = args
    act = {None: lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation]
    scale, zero_point = kwargs["out_scale"], kwargs["out_zero_point"]
    channel, bias = kwargs.get("scale"), kwargs.get("bias")

    def real(x: torch.Tensor) -> torch.Tensor:
        if channel is None:
            return act(x.float())
        return act(x.float() * channel if bias is None else x.float() * channel + bias)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(real(x) * (1 / scale)) + zero_point, 0, 255).to(torch.uint8)

    return named(
        torch_eager=lambda: torch.quantize_per_tensor(
            real(x), scale, zero_point, torch.quint8
        ).int_repr(),
        torch_compile=compiled(plain, x),
    )

"""Rivals of ``attention_map_kl``: the same loss from L x L maps, in torch, eager and compiled.

Beyond ``DENSE_ROWS`` rows in all heads the maps of one call take gigabytes, and they are left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import rivals as rivals_module
from fastrec import kernels
from rivals._common import Call, compiled
from rivals.window_sparse_attention import mask_bias

DENSE_ROWS = 16_384 * 2048


def from_maps(
    tq: torch.Tensor, tk: torch.Tensor, sq: torch.Tensor, sk: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Mean over rows of KL(teacher || student), both over the keys that ``bias`` leaves."""
    target = (tq * tq.shape[-1] ** -0.5) @ tk.transpose(-1, -2) + bias
    own = (sq * sq.shape[-1] ** -0.5) @ sk.transpose(-1, -2) + bias
    total = F.kl_div(own.log_softmax(-1), target.softmax(-1), reduction="sum")
    return total / target[..., 0].numel()


def _bias(args: Any) -> torch.Tensor | None:
    """[L, L]; where -1e4 is added a weight is 0, and its logarithm finite, as kl_div needs it."""
    sq, pattern = args[2], args[4]
    batch, heads, length, _ = sq.shape
    small = batch * heads * length * length <= DENSE_ROWS
    return mask_bias(pattern, length, sq.dtype).clamp_min(-1e4) if small else None


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call | None]:
    bias = _bias(args)
    if bias is None:
        return {}
    return {
        "torch, L x L maps": lambda: from_maps(*args[:4], bias),
        "torch.compile, L x L maps": compiled(from_maps, *args[:4], bias),
    }


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """Loss and gradients of the student's q and k."""
    tq, tk, sq, sk, pattern = args
    bias = _bias(args)
    sq, sk = sq.clone().requires_grad_(), sk.clone().requires_grad_()

    def step(loss: Any, *rest: Any) -> Call:
        def call() -> tuple[torch.Tensor, ...]:
            value = loss(tq, tk, sq, sk, *rest)
            return (value.detach(), *torch.autograd.grad(value, (sq, sk)))

        return call

    calls = {"fastrec": step(kernels.attention_map_kl, pattern)}
    if bias is None:
        return calls
    calls["torch, L x L maps"] = step(from_maps, bias)
    if rivals_module.COMPILE:
        fused = torch.compile(from_maps, fullgraph=True, dynamic=False)
        calls["torch.compile, L x L maps"] = step(fused, bias)
    return calls

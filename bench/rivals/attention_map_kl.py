"""Rivals of ``attention_map_kl``: the same loss from L x L maps, in torch, eager and compiled.

Beyond ``DENSE_ROWS`` rows in all heads the maps of one call take gigabytes, and they are left out.
"""

from __future__ import annotations

from typing import Any

import torch

from fastrec import kernels
from rivals._common import Call, compiled

DENSE_ROWS = 16_384 * 2048


def from_maps(
    tq: torch.Tensor, tk: torch.Tensor, sq: torch.Tensor, sk: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean over rows of KL(teacher || student), both over ``mask``."""
    target = (tq @ tk.transpose(-1, -2) * tq.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    own = (sq @ sk.transpose(-1, -2) * sq.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    log_t, log_s = target.log_softmax(-1), own.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s).masked_fill(~mask, 0.0)).sum(-1).mean()


def _mask(args: Any) -> torch.Tensor | None:
    sq, pattern = args[2], args[4]
    batch, heads, length, _ = sq.shape
    small = batch * heads * length * length <= DENSE_ROWS
    return pattern.mask(length, heads) if small else None


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call | None]:
    mask = _mask(args)
    if mask is None:
        return {}
    return {
        "torch, L x L maps": lambda: from_maps(*args[:4], mask),
        "torch.compile, L x L maps": compiled(from_maps, *args[:4], mask),
    }


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """Loss and gradients of the student's q and k."""
    tq, tk, sq, sk, pattern = args
    mask = _mask(args)
    sq, sk = sq.clone().requires_grad_(), sk.clone().requires_grad_()

    def step(loss: Any, *rest: Any) -> Call:
        def call() -> tuple[torch.Tensor, ...]:
            value = loss(tq, tk, sq, sk, *rest)
            return (value.detach(), *torch.autograd.grad(value, (sq, sk)))

        return call

    calls = {"fastrec": step(kernels.attention_map_kl, pattern)}
    return calls if mask is None else calls | {"torch, L x L maps": step(from_maps, mask)}

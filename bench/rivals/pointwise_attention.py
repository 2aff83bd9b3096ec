"""Rivals of ``pointwise_attention``: HSTU's dense formula in torch, eager and compiled.

Scores, biases, SiLU and mask over L x L, two batched products, as published models spell it out. No
fused attention of torch's has SiLU in place of softmax. Rivals get the mask and the numbers of time
buckets, which depend on no weight, made beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastrec.kernels import pointwise_attention
from fastrec.kernels.pointwise_attention.buckets import buckets_of
from fastrec.kernels.pointwise_attention.reference import seen_pairs
from rivals._common import Call, compiled, forward_backward, named


class Dense:
    """The formula over L x L scores, for one length and number of targets."""

    def __init__(self, args: Any, kwargs: dict[str, Any]) -> None:
        q, _, _ = args
        length = q.shape[2]
        history = length - kwargs.get("targets", 0)
        self.mask = seen_pairs(length, history, True, q.device).to(q.dtype) / length
        self.scale = q.shape[-1] ** -0.5
        self.position, self.time = kwargs.get("position_bias"), kwargs.get("time_bias")
        if self.position is not None:
            last = len(self.position) // 2
            row = torch.arange(length)
            self.entries = last + (row[None] - row[:, None]).clamp(-last, last)
        if self.time is not None:
            times = kwargs["timestamps"]
            self.buckets = torch.stack([buckets_of(t, t, kwargs["time_edges"]) for t in times])

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor
    ) -> torch.Tensor:
        scores = q @ k.mT * self.scale
        position, time = tables or (self.position, self.time)
        if position is not None:
            scores = scores + position[self.entries]
        if time is not None:
            scores = scores + time[self.buckets][:, None]
        return (F.silu(scores) * self.mask) @ v


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    dense = Dense(args, kwargs)
    return named(
        {"torch eager": lambda: dense(*args), "torch.compile": compiled(dense.__call__, *args)}
    )


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """Forward and gradients of q, k, v and the tables."""
    dense = Dense(args, kwargs)
    tables = ("position_bias", "time_bias") if "time_bias" in kwargs else ()
    fixed = {name: x for name, x in kwargs.items() if name not in tables}
    leaves = (*args, *(kwargs[name] for name in tables))

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        return pointwise_attention(q, k, v, **fixed, **dict(zip(tables, own, strict=True)))

    return {
        "fastrec": forward_backward(ours, leaves),
        "torch eager autograd": forward_backward(dense, leaves),
    }

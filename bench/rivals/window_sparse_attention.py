"""Rivals of ``window_sparse_attention``: torch's dense attention, with the mask and compiled.

Dense SDPA without a mask computes another function (every key); it is there because it is what a
model runs today, and its output is not compared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fastrec.kernels import window_sparse_attention
from rivals._common import Call, compiled, forward_backward, other_work


def _allowed(pattern: Any, length: int) -> torch.Tensor:
    """bool [L, L] of the first head."""
    return pattern.mask(length)[0]


def _block_mask(allowed: torch.Tensor) -> BlockMask:
    """FlexAttention's form of the mask; sparse in blocks of 128 x 128."""
    length = len(allowed)
    by_distance = allowed[0] | allowed[:, 0]

    def seen(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return by_distance[(i - j).abs()]

    return create_block_mask(seen, None, None, length, length, device="cpu")


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call | None]:
    q, k, v, pattern = args
    allowed = _allowed(pattern, q.shape[2])
    bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    calls: dict[str, Call | None] = {
        "torch SDPA dense": other_work(
            "every key", lambda: F.scaled_dot_product_attention(q, k, v)
        ),
        "torch SDPA + mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
    }
    if q.dtype == torch.float32:
        mask = _block_mask(allowed)
        calls["FlexAttention compiled"] = compiled(
            lambda q, k, v: flex_attention(q, k, v, block_mask=mask), q, k, v
        )
    return calls


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """Forward and gradients of q, k and v. FlexAttention has no CPU backward."""
    q, k, v, pattern = args
    allowed = _allowed(pattern, q.shape[2])
    bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    return {
        "fastrec": forward_backward(
            lambda q, k, v: window_sparse_attention(q, k, v, pattern), (q, k, v)
        ),
        "SDPA autograd": forward_backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), (q, k, v)
        ),
    }

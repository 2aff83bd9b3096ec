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
from fastrec.kernels._registry import Sample
from fastrec.kernels.window_sparse_attention import AttentionPattern
from rivals._common import (
    Call,
    compiled,
    forward_backward,
    named,
    onnx_attention,
    other_work,
)

# Where whole score matrices, and dense attention, stop being what anybody would run.
SHORT, LONG = 512, 8192


def mask_bias(pattern: AttentionPattern, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[L, L]: 0 where the pattern sees, else -inf; SDPA reads it faster than booleans."""
    assert not pattern.causal, "the bench's patterns look both ways"
    assert not pattern.per_head, "the bench's patterns are alike for all heads"
    by_distance = torch.full((length,), -torch.inf, dtype=dtype)
    by_distance[: pattern.window + 1] = 0
    by_distance[list(pattern.distances(length))] = 0
    both_ways = torch.cat([by_distance[1:].flip(0), by_distance])
    return both_ways.unfold(0, length, 1).flip(0).contiguous()


def _block_mask(pattern: AttentionPattern, length: int) -> BlockMask:
    """FlexAttention's form of the mask.

    Blocks of 32 x 32 and arithmetic in place of a table took 81 ms where its default, blocks of
    128 x 128, and a table took 232 ms (L = 4,096).
    """
    assert pattern.offsets == "log2", "the bench's pattern"
    window = pattern.window

    def seen(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        distance = (i - j).abs()
        return (distance <= window) | ((distance & (distance - 1)) == 0)

    block = 32 if length > SHORT else 128
    return create_block_mask(seen, None, None, length, length, device="cpu", BLOCK_SIZE=block)


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    q, k, v, pattern = args
    batch, _, length, _ = q.shape
    bias = mask_bias(pattern, length, q.dtype)
    calls: dict[str, Call | None] = {
        "torch SDPA + mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
    }
    if length < LONG:
        dense = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
        calls["torch SDPA dense"] = other_work("every key", dense)
    if q.dtype is torch.float32:
        if batch == 1 and length in (100, LONG):  # compiling takes a while
            mask = _block_mask(pattern, length)
            calls["FlexAttention compiled"] = compiled(
                lambda q, k, v: flex_attention(q, k, v, block_mask=mask), q, k, v
            )
        if length <= SHORT:
            calls |= onnx_attention(q, k, v, bias, threads)
    return named(calls)


def trained(sample: Sample) -> bool:
    return "bfloat16" not in sample.name and not SHORT < sample.labels["length"] < LONG


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """Forward and gradients of q, k and v. FlexAttention has no CPU backward."""
    q, k, v, pattern = args
    bias = mask_bias(pattern, q.shape[2], q.dtype)
    return {
        "fastrec": forward_backward(
            lambda q, k, v: window_sparse_attention(q, k, v, pattern), (q, k, v)
        ),
        "SDPA autograd": forward_backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), (q, k, v)
        ),
    }

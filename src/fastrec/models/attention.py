"""Attention modules of the models: merged projections, one SDPA call, maps recordable on demand.

Glossary: B batch, H heads, L history length, m candidates, d model width, D = d / H head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the scores of masked keys. Finite, so that a row with no valid key stays finite, and
# exact in fp16 and bf16; exp(-30000) is 0 in every dtype.
MASKED = -30000.0


class Attention(nn.Module):
    """Scaled dot-product attention core: everything after the input projections.

    ``record`` is None, or the list that :func:`record_attention` collects maps into.
    """

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = d // n_heads
        self.out_proj = nn.Linear(d, d)
        self.record: list[Tensor] | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Attend and merge heads: q [B, H, Lq, D], k and v [B, H, Lk, D] -> [B, Lq, d].

        ``bias`` is added to the scores, broadcastable to [B, H, Lq, Lk]; ``causal`` and ``bias``
        exclude each other.
        """
        if self.record is None:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            if bias is not None:
                scores = scores + bias
            if causal:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(later, MASKED)
            weights = scores.softmax(-1)
            self.record.append(weights)
            context = weights @ v
        return self.out_proj(context.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Multi-head self attention with one merged projection ``in_proj`` [3d, d] (q, k, v rows)."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__(d, n_heads)
        self.in_proj = nn.Linear(d, 3 * d)

    def forward(self, x: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, L, d], bias broadcastable to [B, H, L, L] -> [B, L, d]."""
        # [B, L, 3d] -> 3 x [B, H, L, D], all views
        qkv = self.in_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, bias, causal)


class CrossAttention(Attention):
    """Multi-head attention of queries over a memory; k and v share ``kv_proj`` [2d, d].

    The k rows start equal to the q rows: attention then begins as a similarity between candidate
    and history, so "this very item was seen before" is there from the first step.
    """

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__(d, n_heads)
        self.q_proj = nn.Linear(d, d)
        self.kv_proj = nn.Linear(d, 2 * d)
        with torch.no_grad():
            self.kv_proj.weight[:d].copy_(self.q_proj.weight)

    def forward(self, query: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        """query [B, m, d], memory [B, L, d], bias broadcastable to [B, H, m, L] -> [B, m, d]."""
        q = self.q_proj(query).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        kv = self.kv_proj(memory).unflatten(-1, (2, self.n_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, bias)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + ffn(norm(x)), GELU."""

    def __init__(self, d: int, n_heads: int, ffn: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d)
        self.attention = SelfAttention(d, n_heads)
        self.ffn_norm = nn.LayerNorm(d)
        self.ffn = nn.Sequential(nn.Linear(d, ffn), nn.GELU(), nn.Linear(ffn, d))
        self.dropout = dropout

    def forward(self, x: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, L, d] -> [B, L, d]."""
        if self.training and self.dropout:
            x = x + F.dropout(self.attention(self.attention_norm(x), bias, causal), self.dropout)
            return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout)
        x = x + self.attention(self.attention_norm(x), bias, causal)
        return x + self.ffn(self.ffn_norm(x))


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention maps of each forward inside the block.

    Yields a list that every attention module of ``model`` appends its map [B, H, Lq, Lk] to, in the
    order of execution (encoder blocks first, the cross attention last). Maps carry gradients, so
    that a student's can be pulled towards a teacher's. Recording spells the softmax out, which is
    slower than the fused call; clear the list between forwards to keep memory flat.
    """
    maps: list[Tensor] = []
    modules = [module for module in model.modules() if isinstance(module, Attention)]
    before = [module.record for module in modules]
    for module in modules:
        module.record = maps
    try:
        yield maps
    finally:
        for module, record in zip(modules, before, strict=True):
            module.record = record

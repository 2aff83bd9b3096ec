"""SASRec: self-attentive sequential recommendation (Kang and McAuley, 2018, section 3).

Pre-norm blocks and full softmax training differ from the paper: both are known to be better on
the same data, and the tied item table is the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.errors import ArgumentError
from fastrec.models.attention import EncoderBlock
from fastrec.models.config import Config
from fastrec.models.encoder import EncoderConfig, as_encoder


@dataclass(frozen=True)
class SASRecConfig(Config):
    """Sizes of a :class:`SASRec`.

    Args:
        n_items: rows of the item table, row 0 (padding) included.
        max_length: longest history.
        d: model width; a multiple of ``n_heads``.
        n_blocks: transformer blocks.
        n_heads: heads of each block.
        ffn: hidden width of the feed-forward part.
        dropout: rate on the input and inside the blocks while training.
        encoder: what the blocks attend and project with; the default is a plain transformer's. A
            pattern is made causal.
        input_scale: factor on the item and position vectors that go in (not on those that score);
            the paper's is ``d ** 0.5``, with which the same training gets further.

    Raises:
        ArgumentError: a size or ``input_scale`` is not positive, ``d`` is not a multiple of
            ``n_heads``, or ``encoder`` does not fit.
    """

    n_items: int
    max_length: int = 200
    d: int = 64
    n_blocks: int = 2
    n_heads: int = 2
    ffn: int = 256
    dropout: float = 0.2
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", as_encoder(self.encoder))
        for name in ("n_items", "max_length", "d", "n_blocks", "n_heads", "ffn"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "a positive integer", getattr(self, name))
        if self.d % self.n_heads:
            raise ArgumentError("d", f"a multiple of n_heads = {self.n_heads}", self.d)
        if not 0 <= self.dropout < 1:
            raise ArgumentError("dropout", "a rate in [0, 1)", self.dropout)
        if not (math.isfinite(self.input_scale) and self.input_scale > 0):
            raise ArgumentError("input_scale", "a positive number", self.input_scale)
        self.encoder.check(self.d, self.n_heads, self.ffn, causal=True)


class SASRec(nn.Module):
    """Next-item model: causal encoder over item ids, scores by the tied item table."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items, config.d, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.d)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.d, config.n_heads, config.ffn, config.dropout, config.encoder, causal=True
            )
            for _ in range(config.n_blocks)
        )
        self.final_norm = nn.LayerNorm(config.d)
        for table in (self.item_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item_embedding.weight[0].zero_()

    def forward(self, item: Tensor, length: Tensor) -> Tensor:
        """Hidden states [B, L, d] of histories int64 [B, L]; state i sees positions 0..i.

        Left-aligned rows need no mask beyond the causal one, so ``length`` (int64 [B]) only says
        which states mean anything: those before it.
        """
        x = self.item_embedding(item)
        x = x + self.position_embedding(torch.arange(item.shape[1], device=item.device))
        if self.config.input_scale != 1:
            x = x * self.config.input_scale
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for block in self.blocks:
            x = block(x, None, True)
        return self.final_norm(x)

    def last_state(self, item: Tensor, length: Tensor) -> Tensor:
        """State after the newest event [B, d]; 0 for an empty history."""
        hidden = self(item, length)
        index = (length - 1).clamp_min(0)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, index).squeeze(1) * (length > 0).to(hidden.dtype)[:, None]

    def item_table(self) -> Tensor:
        """The item vectors [n_items, d] as a lookup gives them.

        Of a quantised table, and of one that trains with rounding or pruned blocks, these are the
        looked-up rows, not the stored weights.
        """
        if type(self.item_embedding) is nn.Embedding:
            return self.item_embedding.weight
        ids = torch.arange(self.config.n_items, device=self.position_embedding.weight.device)
        return self.item_embedding(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the catalogue [..., n_items] of states [..., d]; column 0 is padding."""
        return F.linear(hidden, self.item_table())

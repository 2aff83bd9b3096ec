"""A self-attentive sequential recommender in plain torch, compiled into one native call.

python examples/plain_sasrec.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fastrec


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each after a LayerNorm."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, d] to [B, L, d]."""
        batch, length, d = x.shape
        qkv = self.qkv(self.first(x)).view(batch, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, d))
        return x + self.down(F.gelu(self.up(self.second(x))))


class PlainSasrec(nn.Module):
    """Scores of m candidates: their embeddings times the last state of a causal encoder."""

    def __init__(self, n_items: int = 1000, length: int = 20, d: int = 32) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, d)
        self.positions = nn.Parameter(torch.randn(length, d) * 0.02)
        self.blocks = nn.ModuleList(Block(d, 4) for _ in range(2))
        self.norm = nn.LayerNorm(d)

    def forward(self, history: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """history [B, L] and candidates [B, m] (ids) to scores [B, m]."""
        x = self.items(history) + self.positions
        for block in self.blocks:
            x = block(x)
        last = self.norm(x)[:, -1:]
        return (self.items(candidates) * last).sum(-1)


def example_inputs(batch: int = 8, n_items: int = 1000, length: int = 20) -> list[torch.Tensor]:
    """Random histories and 50 candidates each."""
    return [
        torch.randint(0, n_items, (batch, length)),
        torch.randint(0, n_items, (batch, 50)),
    ]


def main() -> None:
    """Compile, compare with torch, then the same quantised."""
    model, inputs = PlainSasrec().eval(), example_inputs()
    for name in ("fp32", "int8"):
        if name == "int8":
            fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
        engine = fastrec.compile(model, inputs, backend="native", settings={"executor": "plan"})
        with torch.inference_mode():
            error = float((engine(*inputs) - model(*inputs)).abs().max())
        print(f"{name}: largest difference from torch {error:.2g}")


if __name__ == "__main__":
    main()

"""An HSTU-like recommender (Zhai et al. 2024) in plain torch, made low-rank, then INT8.

python examples/plain_hstu.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fastrec


class HstuBlock(nn.Module):
    """Pointwise attention: SiLU in place of softmax, and the result gated by u."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.uvqk, self.out = nn.Linear(d, 4 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, d] to [B, L, d]."""
        batch, length, d = x.shape
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        v, q, k = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (v, q, k))
        weights = F.silu(q @ k.transpose(-2, -1)) / length
        weights = weights * torch.ones(length, length, device=x.device).tril()
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, d)
        return x + self.out(self.inner_norm(mixed) * u)


class PlainHstu(nn.Module):
    """Scores of m candidates by the last state."""

    def __init__(self, n_items: int = 2000, length: int = 20, d: int = 64) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, d)
        self.positions = nn.Parameter(torch.randn(length, d) * 0.02)
        self.blocks = nn.ModuleList(HstuBlock(d, 4) for _ in range(2))
        self.norm = nn.LayerNorm(d)

    def forward(self, history: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """history [B, L] and candidates [B, m] (ids) to scores [B, m]."""
        x = self.items(history) + self.positions
        for block in self.blocks:
            x = block(x)
        return (self.items(candidates) * self.norm(x)[:, -1:]).sum(-1)


def example_inputs(batch: int = 8, n_items: int = 2000, length: int = 20) -> list[torch.Tensor]:
    """Random histories and 50 candidates each."""
    return [
        torch.randint(0, n_items, (batch, length)),
        torch.randint(0, n_items, (batch, 50)),
    ]


def accelerate(model: nn.Module) -> fastrec.compress.QuantizeReport:
    """The few calls: low-rank where that is cheaper, then INT8. Train between the two."""
    report = fastrec.replace_(model, fastrec.LowRank(rank=32))
    for name, reason in report.left.items():
        print(f"not replaced: {name}: {reason}")
    return fastrec.quantize_(model, fastrec.Int8(), calibration=[example_inputs(64)])


def main() -> None:
    """Accelerate, list what was left alone, compile, compare."""
    torch.manual_seed(0)
    model, inputs = PlainHstu().eval(), example_inputs()
    report = accelerate(model)
    print("INT8:", ", ".join([*report.layers, *report.tables]))
    for name, reason in report.left.items():
        print(f"left alone: {name}: {reason}")
    engine = fastrec.compile(model, inputs, backend="native")
    with torch.inference_mode():
        error = float((engine(*inputs) - model(*inputs)).abs().max())
    print(f"largest difference from torch {error:.2g}")


if __name__ == "__main__":
    main()

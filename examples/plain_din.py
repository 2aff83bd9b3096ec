"""A deep interest network in plain torch: the target weighs the history; then pruned and quantised.

python examples/plain_din.py
"""

from __future__ import annotations

import torch
from torch import nn

import fastrec


class PlainDin(nn.Module):
    """Each history item is weighed by a small network that sees it beside the target; id 0 pads."""

    def __init__(self, n_items: int = 2000, d: int = 32) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, d, padding_idx=0)
        self.weigh = nn.Sequential(
            nn.Linear(4 * d, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )
        self.tower = nn.Sequential(
            nn.Linear(2 * d, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1)
        )

    def forward(self, history: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """history [B, L] and target [B] (ids) to scores [B]."""
        events = self.items(history)
        wanted = self.items(target).unsqueeze(1).expand_as(events)
        beside = torch.cat([events, wanted, events - wanted, events * wanted], dim=-1)
        weight = self.weigh(beside) * (history != 0).unsqueeze(-1)
        interest = (weight * events).sum(1)
        return self.tower(torch.cat([interest, wanted[:, 0]], dim=-1)).squeeze(-1)


def example_inputs(batch: int = 8, n_items: int = 2000, length: int = 20) -> list[torch.Tensor]:
    """Random histories, some of them padded, and targets."""
    history = torch.randint(1, n_items, (batch, length))
    history[torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))] = 0
    return [history, torch.randint(1, n_items, (batch,))]


def accelerate(model: nn.Module) -> fastrec.compress.QuantizeReport:
    """The few calls: prune 40 %, then INT8. Train between the two on your own data."""
    fastrec.prune_(model, fastrec.BlockPruning(0.4))
    return fastrec.quantize_(model, fastrec.Int8(), calibration=[example_inputs(64)])


def main() -> None:
    """Accelerate, list what was left alone, compile, compare."""
    torch.manual_seed(0)
    model, inputs = PlainDin().eval(), example_inputs()
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

"""A fine-tuning step with masks and fake quantisation beside the dense fp32 step.

python bench/finetune_step.py [--model sasrec|ranker] [--rounds 7] [--threads 2] [--profile]

Both models take the same batches in turn; the ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import fastrec
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.train import TrainConfig
from fastrec.train.loop import make_optimizer
from fastrec.train.losses import default_loss

BATCH = 64


class RankerBatch:
    """Random histories of the canonical size, 12 candidates."""

    def __init__(self, config: RankerConfig) -> None:
        size = (BATCH, config.history_length)
        self.label = np.zeros(BATCH, np.int64)
        tensors = (
            torch.randint(1, config.n_items, size),
            torch.randint(1, config.n_categories, size),
            torch.randint(1, config.n_behaviours + 1, size),
            torch.full((BATCH,), config.history_length),
            torch.randint(1, config.n_items, (BATCH, 12)),
            torch.randint(1, config.n_categories, (BATCH, 12)),
        )
        self._inputs = tuple(t.numpy() for t in tensors)

    def inputs(self) -> tuple[np.ndarray, ...]:
        """The ranker's six."""
        return self._inputs


def make(name: str) -> tuple[nn.Module, object, object]:
    """A model, a training batch, and what calibrates it."""
    torch.manual_seed(0)
    if name == "ranker":
        config = RankerConfig.taobao()
        batch = RankerBatch(config)
        return Ranker(config), batch, batch
    sizes = SASRecConfig(n_items=3417, max_length=200, d=64)
    item = torch.randint(1, sizes.n_items, (BATCH, 200))
    length = torch.full((BATCH,), 200)
    batch = tuple(t.numpy() for t in (item, length, item.roll(1, 1)))
    return SASRec(sizes), batch, (item, length)


def stepper(model: nn.Module, batch: object) -> Callable[[], float]:
    """A training step that returns its seconds."""
    optimizer = make_optimizer(model.train(), TrainConfig())
    loss_fn = default_loss(model)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - started

    return step


def main() -> None:
    """Print the two times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("sasrec", "ranker"), default="sasrec")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="torch's profile of the masked step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense, batch, inputs = make(args.model)
    masked, _, _ = make(args.model)
    fastrec.prune_(masked, fastrec.BlockPruning(0.4))
    fastrec.quantize_(masked, fastrec.QAT("prepare"), calibration=[inputs])
    steps = {"dense": stepper(dense, batch), "masked": stepper(masked, batch)}
    for step in steps.values():
        step()
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            steps["masked"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=24))
    rounds = [{name: step() for name, step in steps.items()} for _ in range(args.rounds)]
    ratios = sorted(r["masked"] / r["dense"] for r in rounds)
    for name in steps:
        print(f"{name:7} {1e3 * statistics.median(r[name] for r in rounds):8.1f} ms")
    print(f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()

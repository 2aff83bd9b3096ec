"""A fine-tuning step with masks and fake quantisation beside the dense fp32 step.

python bench/finetune_step.py [--model sasrec|ranker] [--rounds 25] [--threads 2] [--out DIR]

SASRec (d=64, 200 events) and the canonical ranker, batches of 64. Dense and masked model take
turns; the ratio is the median of the rounds' own ratios, its interval from drawing rounds again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastrec
from fastrec.measure.machine import machine_card
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.train import TrainConfig
from fastrec.train.loop import make_optimizer
from fastrec.train.losses import default_loss

BATCH = 64
GOAL = 1.25  # of the dense step


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


def measure(name: str, rounds: int, profile: bool) -> dict[str, Any]:
    """Milliseconds of both steps and their ratio."""
    dense, batch, inputs = make(name)
    masked, _, _ = make(name)
    fastrec.prune_(masked, fastrec.BlockPruning(0.4))
    fastrec.quantize_(masked, fastrec.QAT("prepare"), calibration=[inputs])
    steps = {"dense": stepper(dense, batch), "masked": stepper(masked, batch)}
    for step in steps.values():
        step()
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            steps["masked"]()
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=24))
    taken = [{kind: step() for kind, step in steps.items()} for _ in range(rounds)]
    ratios = np.array([r["masked"] / r["dense"] for r in taken])
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    times = {f"{kind}_ms": 1e3 * statistics.median(r[kind] for r in taken) for kind in steps}
    return {"model": name, **times, "rounds": rounds, "ratio": float(np.median(ratios)),
            "low": float(low), "high": float(high), "goal": GOAL}  # fmt: skip


def main() -> None:
    """Print the times and ratios; write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("sasrec", "ranker"), help="one of the two")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="torch's profile of the masked step")
    parser.add_argument("--out", type=Path, help="folder for finetune_step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = (args.model,) if args.model else ("sasrec", "ranker")
    rows = [measure(name, args.rounds, args.profile) for name in names]
    for row in rows:
        print(
            "{model:7} dense {dense_ms:.1f} ms, masked {masked_ms:.1f} ms,"
            " ratio {ratio:.3f} [{low:.3f}, {high:.3f}] (goal {goal})".format(**row)
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine_card(), "threads": args.threads, "rows": rows}
        (args.out / "finetune_step.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

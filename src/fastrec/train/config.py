"""Settings and result of a training run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from fastrec.errors import ArgumentError
from fastrec.models.config import Config


@dataclass(frozen=True)
class TrainConfig(Config):
    """How to train; the defaults are the measured recipe for a ranker of the demo's size on CPU.

    :meth:`sasrec` is the recipe for SASRec; both are in docs/training.md.

    Args:
        epochs: passes over the users (each gives one random target an epoch).
        batch_size: users a step.
        lr: peak learning rate of AdamW: linear warm-up, then a cosine down to ``final_lr`` of it.
        final_lr: share of ``lr`` left at the end.
        weight_decay: on matrices only; tables, biases and norms are left alone.
        warmup: share of all steps spent warming up.
        n_candidates: positive + training negatives (ranker).
        negatives: "popularity" or "uniform", how training negatives are drawn (ranker).
        history_length: use only the newest events of each history; None = all stored.
        clip: gradient norm limit; None = no clipping.
        seed: seed of batches, negatives, dropout.
        amp: mixed precision where it is faster on the device.
        max_steps: stop after this many steps; also sets the length of the schedule when it is less
            than ``epochs`` give.
        patience: stop after this many epochs without a better validation metric; None = never.
        metric: the validation metric (candidates protocol): "ndcg_10", "hit_rate_10", "mrr", ...
        valid_users: users validated after each epoch; 0 = none, the last weights are kept.
        checkpoint_steps: also write a checkpoint every this many steps, not only after each epoch.

    Raises:
        ArgumentError: a value out of range.
    """

    epochs: int = 7
    batch_size: int = 64
    lr: float = 2e-3
    final_lr: float = 0.05
    weight_decay: float = 0.01
    warmup: float = 0.05
    n_candidates: int = 6
    negatives: str = "popularity"
    history_length: int | None = None
    clip: float | None = 1.0
    seed: int = 0
    amp: bool = True
    max_steps: int | None = None
    patience: int | None = 3
    metric: str = "ndcg_10"
    valid_users: int = 500
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "a positive integer", getattr(self, name))
        for name in ("max_steps", "patience", "checkpoint_steps", "history_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(name, "a positive integer or None", value)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError("lr", "a positive number", self.lr)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ArgumentError("weight_decay", "zero or more", self.weight_decay)
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(name, "a share in [0, 1]", getattr(self, name))
        if self.n_candidates < 2:
            raise ArgumentError("n_candidates", "two or more", self.n_candidates)
        if self.negatives not in ("popularity", "uniform"):
            raise ArgumentError("negatives", '"popularity" or "uniform"', repr(self.negatives))
        if self.clip is not None and not self.clip > 0:
            raise ArgumentError("clip", "a positive number or None", self.clip)
        if self.valid_users < 0:
            raise ArgumentError("valid_users", "zero or more", self.valid_users)

    @classmethod
    def sasrec(cls, **changes: Any) -> TrainConfig:
        """The recipe for SASRec: 20 epochs at 1e-3, with ``changes``."""
        return cls(**{"epochs": 20, "lr": 1e-3, **changes})

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``total``."""
        warm = max(1, round(self.warmup * total))
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, total - warm))
        share = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * share


@dataclass
class TrainReport:
    """Result of :func:`fastrec.train.fit`.

    Attributes:
        steps, epochs: done in all, resumed part included.
        seconds: wall-clock time of this call.
        examples_per_second: training alone, without validation.
        stopped: "finished", "max_steps", "patience" or "on_step".
        best_epoch, best_metric: of the weights that the model now holds (None without validation).
        amp: the autocast dtype, or None.
        history: one row an epoch: epoch, step, loss, lr and the validation metrics.
    """

    steps: int = 0
    epochs: int = 0
    seconds: float = 0.0
    examples_per_second: float = 0.0
    stopped: str = "finished"
    best_epoch: int | None = None
    best_metric: float | None = None
    amp: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON types."""
        return dataclasses.asdict(self)

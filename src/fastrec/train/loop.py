"""The training loop: deterministic by seed, interruptible, resumable bit for bit on a CPU."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrec import terminal
from fastrec.errors import ArgumentError, FastrecError
from fastrec.models import SASRec
from fastrec.train.checkpoint import (
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    save_model,
    unwrapped,
)
from fastrec.train.config import TrainConfig, TrainReport
from fastrec.train.evaluation import evaluate
from fastrec.train.losses import default_loss, model_device
from fastrec.train.precision import autocast_dtype

LossFn = Callable[[Any, Any], Tensor]
Batches = Callable[[int], Iterable[Any]]
OnStep = Callable[[int, float], "bool | None"]
Validate = Callable[[nn.Module], "dict[str, float]"]

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
# Settings that a resumed run may change: they do not alter the steps already taken.
_MAY_CHANGE = ("epochs", "max_steps", "patience", "checkpoint_steps")


class DivergedError(FastrecError, ArithmeticError):
    """The loss became NaN or infinite; names the step."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; decay on the matrices of linear layers, none on tables, biases and norms."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in tables
            (decayed if matrix else plain).append(parameter)
    if not decayed and not plain:
        raise ArgumentError("model", "a model with parameters that require gradients", "none")
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if params
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of one epoch's batches: far apart for neighbouring seeds."""
    return seed * 100_003 + epoch


def default_batches(model: nn.Module, dataset: Any, config: TrainConfig) -> Batches:
    """The training batches of a model's kind, by epoch."""
    if isinstance(model, SASRec):
        length = min(config.history_length or model.config.max_length, model.config.max_length)
        return lambda epoch: dataset.sequences(
            "train",
            batch_size=config.batch_size,
            max_length=length,
            seed=epoch_seed(config.seed, epoch),
            shuffle=True,
        )
    return lambda epoch: dataset.batches(
        "train",
        batch_size=config.batch_size,
        n_candidates=config.n_candidates,
        negatives=config.negatives,
        history_length=config.history_length,
        seed=epoch_seed(config.seed, epoch),
        shuffle=True,
    )


def default_validate(dataset: Any, config: TrainConfig, autocast: torch.dtype | None) -> Validate:
    """Candidates protocol on the validation split's first users."""

    def validate(model: nn.Module) -> dict[str, float]:
        return evaluate(
            model,
            dataset,
            split="valid",
            limit=config.valid_users,
            seed=config.seed,
            autocast=autocast,
            intervals=False,
        ).metrics

    return validate


class _Run:
    """State of one call of :func:`fit`; what must survive an interruption is in ``state``."""

    def __init__(self, model: nn.Module, config: TrainConfig, out: Path | None) -> None:
        self.model, self.config, self.out = model, config, out
        self.optimizer = make_optimizer(model, config)
        self.device = model_device(model)
        self.best: dict[str, Tensor] | None = None
        amp = autocast_dtype(self.device) if config.amp else None
        self.state: dict[str, Any] = {
            "epoch": 0,
            "step": 0,
            "step_in_epoch": 0,
            "loss_sum": 0.0,
            "lr": 0.0,
            "best_epoch": None,
            "best_metric": None,
            "waited": 0,
            "stopped": None,
            "amp": None if amp is None else str(amp).removeprefix("torch."),
            "history": [],
            "config": config.to_dict(),
        }

    @property
    def autocast(self) -> torch.dtype | None:
        return getattr(torch, self.state["amp"]) if self.state["amp"] else None

    def checkpoint(self) -> None:
        if self.out is not None:
            save_checkpoint(self.out / CHECKPOINT, self.model, self.optimizer, self.state)

    def restore(self) -> None:
        assert self.out is not None
        self.state = load_checkpoint(self.out / CHECKPOINT, self.model, self.optimizer)
        before, now = self.state["config"], self.config.to_dict()
        for name, value in now.items():
            if name not in _MAY_CHANGE and before.get(name) != value:
                raise ArgumentError(name, f"{before.get(name)!r} as in the checkpoint", repr(value))
        if self.state["stopped"] == "on_step" or any(before[n] != now[n] for n in _MAY_CHANGE):
            self.state["stopped"] = None
        self.state["config"] = now
        if self.state["best_epoch"] is not None:
            self.best = read_tensors(self.out / MODEL, "model")[0]

    def train_step(self, loss_fn: LossFn, batch: Any, total: int) -> float:
        lr = self.config.lr_at(self.state["step"], total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.state["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        amp = self.autocast
        with torch.autocast(self.device.type, amp) if amp else nullcontext():
            loss = loss_fn(self.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f"loss is {value} at step {self.state['step']} (lr {lr:.2g})")
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.state["step"] += 1
        self.state["step_in_epoch"] += 1
        self.state["loss_sum"] += value
        return value

    def end_epoch(self, validate: Validate | None) -> dict[str, Any]:
        """Validate, keep the best weights, write the checkpoint; returns the epoch's row."""
        state = self.state
        row: dict[str, Any] = {
            "epoch": state["epoch"],
            "step": state["step"],
            "loss": state["loss_sum"] / max(1, state["step_in_epoch"]),
            "lr": state["lr"],
        }
        if validate is not None:
            row |= validate(self.model)
            if self.config.metric not in row:
                known = sorted(set(row) - {"epoch", "step", "loss", "lr"})
                raise ArgumentError("metric", f"one of {known}", repr(self.config.metric))
            metric = float(row[self.config.metric])
            if state["best_metric"] is None or metric > state["best_metric"]:
                state |= {"best_metric": metric, "best_epoch": state["epoch"], "waited": 0}
                weights = unwrapped(self.model).state_dict()
                self.best = {name: weight.detach().clone() for name, weight in weights.items()}
                if self.out is not None:
                    save_model(self.out / MODEL, self.model)
            else:
                state["waited"] += 1
        state["history"].append(row)
        state |= {"epoch": state["epoch"] + 1, "step_in_epoch": 0, "loss_sum": 0.0}
        return row


def fit(
    model: nn.Module,
    dataset: Any,
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
    validate: Validate | None = None,
    on_step: OnStep | None = None,
) -> TrainReport:
    """Train ``model`` in place; it ends with the weights of the best validated epoch.

    The run depends on the seed alone: batches are drawn by (seed, epoch), so a resumed run sees
    what an uninterrupted one would have seen, and on a CPU its weights are the same bit for bit.

    Args:
        model: a :class:`~fastrec.models.Ranker`, a :class:`~fastrec.models.SASRec`, or any module
            that takes the six inputs (or those that ``loss_fn`` passes).
        dataset: a :class:`fastrec.data.SequenceDataset` or an object with its methods.
        config: settings; the defaults are the measured recipe.
        out: folder for ``checkpoint.safetensors`` (after each epoch) and ``model.safetensors`` (the
            best weights, see :func:`load_model`); None writes nothing.
        resume: continue from ``out``'s checkpoint.
        progress: show a progress bar on standard error.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default that of the model's kind.
        batches: ``batches(epoch) -> iterable of batches`` in place of the dataset's.
        validate: ``validate(model) -> {metric: value}`` in place of the candidates protocol.
        on_step: called after each step with (steps done, loss); True stops the run after writing a
            checkpoint, with the weights as they are.

    Returns:
        A :class:`TrainReport`.

    Raises:
        ArgumentError: ``resume`` without ``out``, settings that differ from the checkpoint's, an
            unknown metric, an empty training split.
        ArtifactError: nothing to resume from, or the checkpoint is damaged or of another model.
        DivergedError: the loss is NaN or infinite.
    """
    config = config or TrainConfig()
    if resume and out is None:
        raise ArgumentError("out", "the folder to resume from", None)
    run = _Run(model, config, None if out is None else Path(out))
    loss_fn = loss_fn or default_loss(model)
    batches = batches or default_batches(model, dataset, config)
    per_epoch = math.ceil(dataset.num_examples("train") / config.batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    if total == 0:
        raise ArgumentError("dataset", "at least one training example", "none")
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        if resume:
            run.restore()
        if validate is None and config.valid_users:
            validate = default_validate(dataset, config, run.autocast)
        training = model.training
        try:
            return _train(run, loss_fn, batches, validate, on_step, total, per_epoch, progress)
        finally:
            model.train(training)


def _train(
    run: _Run,
    loss_fn: LossFn,
    batches: Batches,
    validate: Validate | None,
    on_step: OnStep | None,
    total: int,
    per_epoch: int,
    progress: bool,
) -> TrainReport:
    started = time.perf_counter()
    state, config, model = run.state, run.config, run.model
    first, training_seconds = state["step"], 0.0
    smooth: float | None = None
    validated = ""
    with terminal.progress(enabled=progress) as tell:
        while state["stopped"] is None:
            model.train()
            clock = time.perf_counter()
            for batch in _rest_of_epoch(batches, state):
                loss = run.train_step(loss_fn, batch, total)
                smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                note = f"epoch {state['epoch'] + 1}  loss {smooth:.4f}{validated}"
                tell("training", state["step"], total, note)
                if on_step is not None and on_step(state["step"], loss):
                    state["stopped"] = "on_step"
                elif config.checkpoint_steps and state["step"] % config.checkpoint_steps == 0:
                    run.checkpoint()
                if state["stopped"] or state["step"] >= total:
                    break
            training_seconds += time.perf_counter() - clock
            if state["stopped"]:
                break
            if not state["step_in_epoch"]:
                raise ArgumentError("batches", "at least one batch an epoch", "none")
            row = run.end_epoch(validate)
            shown = [name for name in ("hit_rate_10", "ndcg_10") if name in row]
            validated = "".join(f"  {name} {row[name]:.4f}" for name in shown)
            if state["step"] >= total:
                state["stopped"] = "max_steps" if total < config.epochs * per_epoch else "finished"
            elif config.patience is not None and state["waited"] >= config.patience:
                state["stopped"] = "patience"
            else:
                run.checkpoint()
    run.checkpoint()
    if state["stopped"] != "on_step":
        if run.best is not None:
            unwrapped(model).load_state_dict(run.best)
        elif run.out is not None:
            save_model(run.out / MODEL, model)
    examples = (state["step"] - first) * config.batch_size
    return TrainReport(
        steps=state["step"],
        epochs=len(state["history"]),
        seconds=time.perf_counter() - started,
        examples_per_second=examples / training_seconds if training_seconds else 0.0,
        stopped=state["stopped"],
        best_epoch=state["best_epoch"],
        best_metric=state["best_metric"],
        amp=state["amp"],
        history=state["history"],
    )


def _rest_of_epoch(batches: Batches, state: dict[str, Any]) -> Iterator[Any]:
    """The epoch's batches that the (interrupted) run has not seen yet."""
    return itertools.islice(batches(state["epoch"]), state["step_in_epoch"], None)

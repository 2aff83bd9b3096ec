"""SASRec on user-item histories: the fp32 baseline that the other experiments start from.

``python -m experiments.sasrec train --data ml-1m.txt --out RUN``, again with ``--resume`` to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from experiments.histories import Batch, Histories
from experiments.parallel import in_parts
from experiments.ranking import rank
from experiments.softmax import catalogue_loss
from fastrec.models import SASRec, SASRecConfig
from fastrec.train import TrainConfig, fit
from fastrec.train.precision import autocast_dtype

app = typer.Typer(add_completion=False, no_args_is_help=True)

# Users whose validation targets pick the epoch.
VALID_USERS = 2000


def split(batch: Batch, parts: int) -> list[Batch]:
    """Every ``parts``-th row: parts of like lengths."""
    cut = [slice(i, None, parts) for i in range(parts)]
    rows = [Batch(batch.item[c], batch.length[c], batch.target[c], batch.user[c]) for c in cut]
    return [part for part in rows if len(part.item)]


def sequence_loss(
    guide: SASRec | None = None, share: float = 0.0, dtype: torch.dtype = torch.float32
) -> Callable[[Any, Batch], Tensor]:
    """``loss(model, batch)``: sum of the cross entropy over a batch's targets.

    Args:
        guide: a teacher whose distribution over the catalogue is ``share`` of the target.
        dtype: of the scores (:func:`catalogue_loss`).
    """

    def loss(model: Any, batch: Batch) -> Tensor:
        item, length, target = (
            torch.from_numpy(np.ascontiguousarray(a))
            for a in (batch.item, batch.length, batch.target)
        )
        wanted = target > 0
        hidden = model(item, length)[wanted]
        hint = None
        if guide is not None:
            with torch.no_grad():
                hint = guide(item, length)[wanted], guide.item_table()
        return catalogue_loss(
            hidden, model.item_table(), target[wanted], guide=hint, share=share, dtype=dtype
        )

    return loss


def score_dtype() -> torch.dtype:
    """What this CPU computes the catalogue's scores in fastest while training."""
    return autocast_dtype(torch.device("cpu")) or torch.float32


def mean_loss(loss: Callable[[Any, Batch], Tensor], workers: int) -> Callable[[Any, Batch], Tensor]:
    """The loss over the number of targets in the whole batch, computed on ``workers`` threads."""
    summed = in_parts(loss, split, workers)
    return lambda model, batch: summed(model, batch) / int((batch.target > 0).sum())


def validator(data: Histories, users: int, seed: int = 0) -> Callable[[Any], dict[str, float]]:
    """Metrics of some users' validation targets among the whole catalogue."""
    some = np.sort(np.random.default_rng(seed).permutation(data.users())[:users])

    def validate(model: Any) -> dict[str, float]:
        return rank(model, data, "valid", users=some, intervals=False).metrics

    return validate


@app.callback()
def _group() -> None:
    """SASRec on user-item histories."""


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="A file of 'user item' lines in time order.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and weights.")],
    d: Annotated[int, typer.Option(help="Model width.")] = 64,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 2,
    dropout: Annotated[float, typer.Option(help="Rate while training.")] = 0.2,
    epochs: Annotated[int, typer.Option(help="Passes over the users.")] = 28,
    batch_size: Annotated[int, typer.Option(help="Users a step, on average.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2.5e-3,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads.")] = 2,
    resume: Annotated[bool, typer.Option(help="Go on from --out.")] = False,
) -> None:
    """Train a baseline; validation picks the epoch, the test split is not read."""
    histories = Histories.read(data)
    torch.manual_seed(seed)
    config = SASRecConfig(histories.n_items, d=d, n_heads=heads, ffn=d, dropout=dropout,
                          input_scale=d**0.5)  # fmt: skip
    settings = TrainConfig.sasrec(
        epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, amp=False, patience=None,
        checkpoint_steps=100, metric="ndcg_10", valid_users=VALID_USERS, weight_decay=0.01,
        warmup=0.02, final_lr=0.02,
    )  # fmt: skip
    report = fit(
        SASRec(config),
        histories,
        settings,
        out=out,
        resume=resume,
        loss_fn=mean_loss(sequence_loss(dtype=score_dtype()), workers),
        batches=lambda epoch: histories.training(batch_size, seed * 100_003 + epoch),
        validate=validator(histories, VALID_USERS),
    )
    typer.echo(report)


if __name__ == "__main__":
    app()

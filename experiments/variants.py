"""What each technique costs a trained SASRec, alone and together, on the same test users.

``python -m experiments.variants --data ml-1m.txt --base RUN --out RUN/variants`` after
``python -m experiments.sasrec train``. Each variant starts from the baseline's weights, is
fine-tuned for a few epochs with the baseline's scores as half of its target, and is ranked over the
whole catalogue. "control" is the dense fp32 model fine-tuned just as long: what more training gives
is not a technique's merit. A variant that is done is kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import fastrec
from experiments.histories import Histories
from experiments.ranking import rank
from experiments.sasrec import mean_loss, sequence_loss
from fastrec import AttentionPattern
from fastrec.compress import artifact_bytes
from fastrec.models import SASRec
from fastrec.models.encoder import EncoderConfig
from fastrec.train import Evaluation, TrainConfig, fit, load_model
from fastrec.train.checkpoint import read_tensors, write_tensors

BATCH = 64
ROUNDS = 3
SHARE = 0.5  # of the baseline's distribution in the target
WINDOW = AttentionPattern(window=16, offsets="log2")
LOCAL = AttentionPattern(window=16, offsets="none")


@dataclass(frozen=True)
class Variant:
    """What is done to the baseline, in this order.

    Args:
        pattern: who attends whom; None is dense.
        width: of a student that starts fresh; None keeps the model.
        sparsity: share of linear weights and of table weights pruned, in three rounds.
        int8: quantisation-aware training, then INT8.
        tune: whether it is fine-tuned at all.
        scale: of the number of fine-tuning epochs; a student has all to learn.
    """

    name: str
    pattern: AttentionPattern | None = None
    width: int | None = None
    sparsity: float = 0.0
    int8: bool = False
    tune: bool = True
    scale: int = 1


VARIANTS = (
    Variant("baseline", tune=False),
    Variant("int8, not fine-tuned", int8=True, tune=False),
    Variant("40 % pruned + int8", sparsity=0.4, int8=True),
    Variant("window + log2", WINDOW),
    Variant("75 % pruned + int8", sparsity=0.75, int8=True),
    Variant("local only", LOCAL),
    Variant("control"),
    Variant("all: window + log2, 40 % pruned, int8", WINDOW, sparsity=0.4, int8=True),
    Variant("distilled, a fifth of the parameters", width=16, scale=4),
)


class Tuner:
    """Fine-tunes models of one data set beside one teacher."""

    def __init__(
        self, data: Histories, teacher: SASRec, lr: float, prune_lr: float, workers: int, seed: int
    ):
        self.data, self.workers, self.seed = data, workers, seed
        self.lr, self.prune_lr = lr, prune_lr
        self.teacher = teacher
        self.calls = 0

    def __call__(self, model: nn.Module, epochs: int, lr: float | None = None) -> None:
        """``epochs`` passes at a learning rate that falls from ``lr`` to a twentieth."""
        lr = self.lr if lr is None else lr
        self.calls += 1
        config = TrainConfig.sasrec(
            epochs=epochs, batch_size=BATCH, lr=lr, seed=self.seed + self.calls, amp=False,
            valid_users=0, patience=None,
        )  # fmt: skip
        first = (self.seed + self.calls) * 100_003
        fit(
            model,
            self.data,
            config,
            loss_fn=mean_loss(sequence_loss(self.teacher, SHARE), self.workers),
            batches=lambda epoch: self.data.training(BATCH, first + epoch),
            validate=None,
        )

    def calibration(self, batches: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Some training histories as the model's inputs."""
        found = []
        for batch in self.data.training(BATCH, self.seed):
            found.append((torch.from_numpy(batch.item), torch.from_numpy(batch.length)))
            if len(found) == batches:
                break
        return found


def make(variant: Variant, base: SASRec, tune: Tuner, epochs: int) -> nn.Module:
    """The variant's model."""
    torch.manual_seed(tune.seed)
    config = base.config
    epochs *= variant.scale
    if variant.width is not None:
        small = dataclasses.replace(config, d=variant.width, ffn=4 * variant.width, dropout=0.0)
        student = SASRec(small)
        with torch.no_grad():
            # The teacher's item vectors on their principal directions.
            _, _, directions = torch.linalg.svd(base.item_embedding.weight, full_matrices=False)
            basis = directions[: variant.width].t()
            student.item_embedding.weight.copy_(base.item_embedding.weight @ basis)
            student.position_embedding.weight.copy_(base.position_embedding.weight @ basis)
        tune(student, epochs, tune.prune_lr)
        return student
    encoder = EncoderConfig(pattern=variant.pattern)
    model = SASRec(dataclasses.replace(config, encoder=encoder))
    model.load_state_dict(base.state_dict())
    if variant.pattern is not None:
        tune(model, epochs)
    if variant.sparsity:
        fastrec.prune_(
            model,
            fastrec.BlockPruning(sparsity=variant.sparsity, rounds=ROUNDS),
            finetune=lambda pruned, _: tune(pruned, epochs, tune.prune_lr),
        )
    if variant.int8 and variant.tune:
        fastrec.quantize_(model, fastrec.QAT("prepare"), calibration=tune.calibration())
        tune(model, 2 * epochs)
        fastrec.quantize_(model, fastrec.QAT("convert"))
    elif variant.int8:
        fastrec.quantize_(model, fastrec.Int8(), calibration=tune.calibration())
    elif variant.tune and variant.pattern is None and not variant.sparsity:
        tune(model, epochs)
    return model


def _ranks_of(out: Path, variant: Variant) -> Path:
    slug = "".join(c if c.isalnum() else "_" for c in variant.name)
    return out / f"{slug}.safetensors"


def run(
    data: Histories,
    base: SASRec,
    out: Path,
    *,
    epochs: int,
    lr: float,
    prune_lr: float,
    workers: int,
    seed: int,
    variants: tuple[Variant, ...] = VARIANTS,
    say: Callable[[str], Any] = print,
) -> None:
    """Make and rank what ``out`` does not hold yet: ranks, sizes and seconds of each variant."""
    out.mkdir(parents=True, exist_ok=True)
    teacher = copy.deepcopy(base).eval().requires_grad_(False)
    for variant in variants:
        file = _ranks_of(out, variant)
        if file.exists():
            continue
        started = time.perf_counter()
        model = make(
            variant, base, Tuner(data, teacher, lr, prune_lr, workers, seed), epochs
        ).eval()
        result = rank(model, data, "test", intervals=False)
        everyone = rank(model, data, "test", exclude_seen=False, intervals=False)
        fastrec.save(model, file.with_suffix(""))
        meta = {
            "variant": dataclasses.asdict(variant) | {"pattern": str(variant.pattern)},
            "epochs": epochs,
            "lr": lr,
            "prune_lr": prune_lr,
            "share": SHARE,
            "seed": seed,
            "bytes": artifact_bytes(file.with_suffix("")),
            "parameters": sum(p.numel() for p in base.parameters())
            if variant.width is None
            else sum(p.numel() for p in model.parameters()),
            "seconds": time.perf_counter() - started,
        }
        tensors = {
            "ranks": torch.from_numpy(result.ranks),
            "ranks_seen_too": torch.from_numpy(everyone.ranks),
            "users": torch.from_numpy(result.users),
        }
        write_tensors(file, "ranks", tensors, {"run": meta})
        say(f"{variant.name}: {json.dumps({k: round(v, 4) for k, v in result.metrics.items()})}")


def read(out: Path, data: Histories) -> dict[str, tuple[Evaluation, Evaluation, dict[str, Any]]]:
    """Variant -> its ranks without and with the items seen, and how it was made; in order."""
    found = {}
    for variant in VARIANTS:
        file = _ranks_of(out, variant)
        if not file.exists():
            continue
        tensors, meta = read_tensors(file, "ranks")
        pair = [
            Evaluation.from_ranks(
                tensors[name].numpy(), users=tensors["users"].numpy(), protocol="full",
                n_candidates=data.n_items - 1, ks=(1, 5, 10, 20, 50),
            )
            for name in ("ranks", "ranks_seen_too")
        ]  # fmt: skip
        found[variant.name] = (pair[0], pair[1], meta["run"])
    return found


app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="A file of 'user item' lines in time order.")],
    base: Annotated[Path, typer.Option(help="Folder that experiments.sasrec train wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for ranks and artifacts.")],
    epochs: Annotated[int, typer.Option(help="Fine-tuning epochs of a stage.")] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate of a stage.")] = 3e-4,
    prune_lr: Annotated[
        float, typer.Option(help="Peak learning rate between rounds of pruning, and of a student.")
    ] = 1e-3,
    workers: Annotated[int, typer.Option(help="Threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of batches and dropout.")] = 1,
) -> None:
    """Make and rank all variants."""
    torch.set_num_threads(workers)
    model = load_model(base / "model.safetensors")
    assert isinstance(model, SASRec)
    run(
        Histories.read(data), model, out, epochs=epochs, lr=lr, prune_lr=prune_lr,
        workers=workers, seed=seed, say=Console().print,
    )  # fmt: skip


if __name__ == "__main__":
    app()

"""What each technique costs a trained SASRec, alone and together, on the same test users.

``python -m experiments.variants --data ml-1m.txt --base RUN --out RUN/variants`` after
``python -m experiments.sasrec train``. Each variant starts from the baseline's weights, is
fine-tuned for a few epochs with the baseline's scores as part of its target, and is ranked over the
whole catalogue. "control" is the dense fp32 model fine-tuned just as long: what more training gives
is not a technique's merit. A variant that is done is kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
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
from experiments.product_table import ProductTable
from experiments.ranking import rank
from experiments.sasrec import mean_loss, score_dtype, sequence_loss
from fastrec import AttentionPattern
from fastrec.compress import artifact_bytes
from fastrec.models import SASRec
from fastrec.models.encoder import EncoderConfig
from fastrec.train import Evaluation, TrainConfig, fit, load_model
from fastrec.train.checkpoint import read_tensors, write_tensors

BATCH = 32
ROUNDS = 3  # of pruning
LEVELS = 31  # largest INT8 code of a weight: the artifact stores entropy
RANK = 27  # of the student's linear layers
WIDE = AttentionPattern(window=32, offsets="log2")
LOCAL = AttentionPattern(window=32, offsets="none")


@dataclass(frozen=True)
class Variant:
    """What is done to the baseline, in this order.

    Args:
        pattern: who attends whom; None is dense.
        student: low-rank linear layers, and a :class:`ProductTable` of the baseline's items.
        sparsity: share of the linear layers' weights pruned, in the kernel's blocks.
        table_sparsity: share of the item table's, each element alone: it is looked up, so that
            zeros are a matter of bytes. None: ``sparsity``.
        int8: quantisation-aware training, then INT8; position vectors too.
        epochs: of fine-tuning, the rounds of pruning not counted; 0 leaves the weights alone.
        round_epochs: behind each round of pruning, at the peak rate.
        lr: peak learning rate of fine-tuning.
        share: of the baseline's distribution in the target; the rest is the item that came next.
        dropout: while fine-tuning.
    """

    name: str
    pattern: AttentionPattern | None = None
    student: bool = False
    sparsity: float = 0.0
    table_sparsity: float | None = None
    int8: bool = False
    epochs: float = 2.5
    round_epochs: float = 0.5
    lr: float = 1.6e-3
    share: float = 0.8
    dropout: float = 0.0


VARIANTS = (
    Variant("baseline", epochs=0),
    Variant("int8, not fine-tuned", int8=True, epochs=0),
    Variant("control", epochs=4),
    Variant("40 % pruned + int8", sparsity=0.4, int8=True),
    Variant("75 % pruned + int8", sparsity=0.75, int8=True, epochs=5, round_epochs=1),
    # 75 % of both together, the layers less than the table: experiments/README.md says why.
    Variant("75 % pruned + int8, layers spared", sparsity=0.55, table_sparsity=0.84, int8=True,
            epochs=5.5, round_epochs=0.75),
    Variant("window 32 + log2", WIDE, epochs=2, lr=4e-4),
    Variant("distilled, a fifth of the parameters", student=True, epochs=6, lr=2e-3),
    Variant("distilled, a fifth of the parameters, longer", student=True, epochs=10, lr=2e-3,
            share=1.0),
    Variant("local only, window 32", LOCAL, epochs=2, lr=4e-4),
    Variant("all: window 32 + log2, 40 % pruned, int8", WIDE, sparsity=0.4, int8=True),
)  # fmt: skip


class Tuner:
    """Fine-tunes models of one data set beside one teacher."""

    def __init__(
        self, data: Histories, teacher: SASRec, variant: Variant, workers: int, seed: int
    ) -> None:
        self.data, self.workers, self.seed = data, workers, seed
        self.variant = variant
        self.teacher = teacher
        self.calls = 0

    def __call__(self, model: nn.Module, epochs: float, final_lr: float = 0.02) -> None:
        """``epochs`` passes at a rate that falls from the variant's to ``final_lr`` of it."""
        self.calls += 1
        steps = epochs * math.ceil(self.data.num_examples("train") / BATCH)
        config = TrainConfig.sasrec(
            epochs=math.ceil(epochs), max_steps=max(1, round(steps)), batch_size=BATCH,
            lr=self.variant.lr, final_lr=final_lr, seed=self.seed + self.calls, amp=False,
            valid_users=0, patience=None,
        )  # fmt: skip
        first = (self.seed + self.calls) * 100_003
        loss = sequence_loss(self.teacher, self.variant.share, score_dtype())
        fit(
            model,
            self.data,
            config,
            loss_fn=mean_loss(loss, self.workers),
            batches=lambda epoch: self.data.training(BATCH, first + epoch),
            validate=None,
        )

    def calibration(self, batches: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Some training histories as the model's inputs."""
        found = []
        for batch in self.data.training(BATCH, self.seed):
            found.append((torch.from_numpy(batch.item), torch.from_numpy(batch.length)))
            if len(found) == batches:
                break
        return found


def make_student(base: SASRec, rank: int, dropout: float) -> SASRec:
    """The baseline with linear layers of a low rank and product-quantised item vectors.

    A byte picks a codeword for each two numbers of an item's vector, so the student starts close
    to its teacher. Codewords are parameters, the bytes are not.
    """
    student = SASRec(dataclasses.replace(base.config, dropout=dropout))
    student.load_state_dict(base.state_dict())
    fastrec.replace_(student, fastrec.LowRank(min(rank, base.config.d // 4)))
    table: Any = ProductTable.of(base.item_embedding.weight.detach(), base.config.d // 2)
    student.item_embedding = table
    return student


def make(variant: Variant, base: SASRec, tune: Tuner) -> nn.Module:
    """The variant's model."""
    torch.manual_seed(tune.seed)
    if variant.student:
        model = make_student(base, RANK, variant.dropout)
    else:
        encoder = EncoderConfig(pattern=variant.pattern)
        config = dataclasses.replace(base.config, encoder=encoder, dropout=variant.dropout)
        model = SASRec(config)
        model.load_state_dict(base.state_dict())
    if variant.sparsity:
        fastrec.prune_(
            model,
            fastrec.BlockPruning(
                variant.sparsity, rounds=ROUNDS, embedding_sparsity=variant.table_sparsity,
                embedding_block=(1, 1), frequency_power=0.5,
            ),
            finetune=lambda pruned, _: tune(pruned, variant.round_epochs, final_lr=1.0),
            row_counts={"item_embedding": tune.data.counts()},
        )  # fmt: skip
    if not variant.int8:
        if variant.epochs:
            tune(model, variant.epochs)
    elif variant.epochs:
        prepare, convert = fastrec.QAT("prepare", levels=LEVELS), fastrec.QAT("convert")
        fastrec.quantize_(model, prepare, calibration=tune.calibration(), filter_fn=_everything)
        tune(model, variant.epochs)
        fastrec.quantize_(model, convert)
    else:
        static = fastrec.Int8(levels=LEVELS)
        fastrec.quantize_(model, static, tune.calibration(), filter_fn=_everything)
    return model


def _everything(module: nn.Module, name: str) -> bool:
    return True


def _ranks_of(out: Path, variant: Variant) -> Path:
    slug = "".join(c if c.isalnum() else "_" for c in variant.name)
    return out / f"{slug}.safetensors"


def run(
    data: Histories,
    base: SASRec,
    out: Path,
    *,
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
        tune = Tuner(data, teacher, variant, workers, seed)
        model = make(variant, base, tune).eval()
        result = rank(model, data, "test", intervals=False)
        everyone = rank(model, data, "test", exclude_seen=False, intervals=False)
        fastrec.save(model, file.with_suffix(""))
        meta = {
            "variant": dataclasses.asdict(variant) | {"pattern": str(variant.pattern)},
            "epochs": variant.epochs + (ROUNDS * variant.round_epochs if variant.sparsity else 0),
            "seed": seed,
            "bytes": artifact_bytes(file.with_suffix("")),
            "parameters": sum(p.numel() for p in (model if variant.student else base).parameters()),
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
    workers: Annotated[int, typer.Option(help="Threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of batches and dropout.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="A variant's name; once for each, all by default.")
    ] = None,
) -> None:
    """Make and rank variants; several processes may share --out if their --only differ."""
    known = [variant.name for variant in VARIANTS]
    if unknown := sorted(set(only or ()) - set(known)):
        raise typer.BadParameter(f"no variant {unknown}; there are {known}", param_hint="--only")
    chosen = tuple(v for v in VARIANTS if not only or v.name in only)
    torch.set_num_threads(workers)
    model = load_model(base / "model.safetensors")
    assert isinstance(model, SASRec)
    run(
        Histories.read(data), model, out, workers=workers, seed=seed,
        variants=chosen, say=Console().print,
    )  # fmt: skip


if __name__ == "__main__":
    app()

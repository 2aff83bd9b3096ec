"""Does window + sparse attention keep what lies far back? The ranker on two synthetic worlds.

``python -m experiments.long_range run --world small --out RUNS`` (and ``--world stress``), then
``python -m experiments.long_range report --runs RUNS --out docs/results``.

A dense ranker is trained; from its weights each attention pattern, dense among them, is fine-tuned
alike, and all are tested on the same users and candidates (1 target + 49 drawn by popularity). The
*long* slice holds the targets whose only evidence is far back: neither the item nor its category is
among the newest 16 events, one of them is among the older ones. What is done is kept: an
interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from experiments.ranking import kept, shown
from fastrec import AttentionPattern
from fastrec.data import SequenceDataset, generate, prepare
from fastrec.measure.machine import machine_card
from fastrec.models import Ranker, RankerConfig
from fastrec.models.config import Config
from fastrec.models.encoder import EncoderConfig
from fastrec.train import Evaluation, TrainConfig, evaluate, fit, load_model
from fastrec.train.checkpoint import read_tensors, write_tensors
from fastrec.train.metrics import RESAMPLES

NEAR = 16
CANDIDATES = 50
METRICS = {"hit_rate_10": "HR@10", "ndcg_10": "NDCG@10", "mrr": "MRR"}
GOAL = 0.99  # of the dense model's HR@10
SPARSE = "window 16 + log2"
PATTERNS = {
    "dense": None,
    SPARSE: AttentionPattern(window=NEAR, offsets="log2"),
    "local only, window 16": AttentionPattern(window=NEAR, offsets="none"),
}


class WorldName(str, Enum):
    """The generator's ``small`` preset, as in the real log or with more of the old interests."""

    small = "small"
    stress = "stress"


@dataclass(frozen=True)
class Setup(Config):
    """Sizes and training; smaller than the canonical ranker, so that two cores can train it.

    Args:
        users, items, categories: of the synthetic log; each user is tested once.
        d, n_heads, ffn, tower: of :class:`RankerConfig`.
        epochs, lr: of the dense model.
        tune_epochs, tune_lr: of each pattern, from the dense model's weights.
        seed: of everything.
    """

    users: int = 16_000
    items: int = 20_000
    categories: int = 300
    d: int = 64
    n_heads: int = 4
    ffn: int = 256
    tower: tuple[int, ...] = (256, 256)
    epochs: int = 6
    lr: float = 2e-3
    tune_epochs: int = 1
    tune_lr: float = 5e-4
    seed: int = 0

    def model(self, data: SequenceDataset, pattern: AttentionPattern | None = None) -> Ranker:
        """A fresh ranker; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Ranker(
                RankerConfig(
                    n_items=data.n_items,
                    n_categories=data.n_categories,
                    n_behaviours=data.n_behaviours - 1,
                    history_length=data.history_length,
                    d=self.d,
                    n_heads=self.n_heads,
                    ffn=self.ffn,
                    tower=self.tower,
                    encoder=EncoderConfig(pattern=pattern),
                )
            )


def open_world(out: Path, world: str, setup: Setup) -> SequenceDataset:
    """The data set of a world, generated once."""
    folder = out / "data"
    if not folder.exists():
        log = out / "log.csv"
        generate(
            log,
            preset="small",
            stress=world == "stress",
            n_users=setup.users,
            n_items=setup.items,
            n_categories=setup.categories,
            seed=setup.seed,
        )
        prepare(log, folder)
        log.unlink()
    return SequenceDataset.open(folder)


def far_targets(data: SequenceDataset, near: int = NEAR) -> NDArray[np.bool_]:
    """Of each test user: is the only evidence of the target more than ``near`` events back?

    Evidence is the target's item or its category. bool [users], in the order of ``evaluate``.
    """
    found = []
    for batch in data.batches("test", batch_size=512, n_candidates=2, shuffle=False):
        target = np.take_along_axis(batch.cand_item, batch.label[:, None], 1)
        category = np.take_along_axis(batch.cand_category, batch.label[:, None], 1)
        position = np.arange(batch.item.shape[1])
        alike = (batch.item == target) | (batch.category == category)
        alike &= position < batch.length[:, None]
        newest = position >= batch.length[:, None] - near
        found.append((alike & ~newest).any(1) & ~(alike & newest).any(1))
    return np.concatenate(found)


def _file(out: Path, name: str) -> Path:
    return out / ("".join(c if c.isalnum() else "_" for c in name) + ".safetensors")


def _test(model: Ranker, data: SequenceDataset, setup: Setup) -> Evaluation:
    return evaluate(
        model,
        data,
        n_candidates=CANDIDATES,
        seed=setup.seed,
        batch_size=256,
        intervals=False,
    )


def run_world(world: str, out: Path, setup: Setup, *, progress: bool = True) -> None:
    """Train, fine-tune and test what ``out`` does not hold yet."""
    out.mkdir(parents=True, exist_ok=True)
    data = open_world(out, world, setup)
    base_folder = out / "dense_base"
    base = setup.model(data)
    training = TrainConfig(
        epochs=setup.epochs, lr=setup.lr, seed=setup.seed, amp=False, checkpoint_steps=100
    )
    fit(
        base,
        data,
        training,
        out=base_folder,
        resume=(base_folder / "checkpoint.safetensors").exists(),
        progress=progress,
    )
    base = load_model(base_folder)  # type: ignore[assignment]
    far = far_targets(data)
    jobs: dict[str, AttentionPattern | None] = {"before fine-tuning": None, **PATTERNS}
    for name, pattern in jobs.items():
        file = _file(out, name)
        if file.exists():
            continue
        started = time.perf_counter()
        model = setup.model(data, pattern)
        model.load_state_dict(base.state_dict())
        if name in PATTERNS:
            tuning = dataclasses.replace(
                training, epochs=setup.tune_epochs, lr=setup.tune_lr, seed=setup.seed + 1
            )
            tuning = dataclasses.replace(tuning, valid_users=0, checkpoint_steps=None)
            fit(model, data, tuning, progress=progress)
        found = _test(model, data, setup)
        tensors = {"ranks": torch.from_numpy(found.ranks), "far": torch.from_numpy(far)}
        meta = {
            "world": world,
            "setup": setup.to_dict(),
            "seconds": time.perf_counter() - started,
            "machine": machine_card(),
        }
        write_tensors(file, "ranks", tensors, meta)


def read_world(out: Path) -> dict[str, Any] | None:
    """Metrics of all test users and of the long slice, and the shares kept; None without any."""
    ranks: dict[str, NDArray[Any]] = {}
    meta: dict[str, Any] = {}
    for name in ("before fine-tuning", *PATTERNS):
        if _file(out, name).exists():
            tensors, meta = read_tensors(_file(out, name), "ranks")
            ranks[name], far = tensors["ranks"].numpy(), tensors["far"].numpy()
    if "dense" not in ranks:
        return None
    slices = {"all": np.ones(len(far), bool), "long": far}
    rows: list[dict[str, Any]] = [{"variant": name} for name in ranks]
    for label, chosen in slices.items():
        if not chosen.any():
            continue
        tested = {
            name: Evaluation.from_ranks(all_ranks[chosen], n_candidates=CANDIDATES, ks=(10,))
            for name, all_ranks in ranks.items()
        }
        for row in rows:
            ours = tested[row["variant"]]
            row[label] = {
                metric: {
                    "value": ours.metrics[metric],
                    "ci95": ours.ci95[metric],
                    "kept": kept(ours, tested["dense"], metric),
                }
                for metric in METRICS
            }
    return {
        "setup": meta["setup"],
        "machine": meta["machine"],
        "users": {label: int(chosen.sum()) for label, chosen in slices.items()},
        "variants": rows,
        "missing": [name for name in PATTERNS if name not in ranks],
    }


def _markdown(worlds: dict[str, Any]) -> str:
    setup = next(iter(worlds.values()))["setup"]
    lines = [
        "# What lies far back: window + sparse attention against dense and local-only",
        "",
        f"Ranker of width {setup['d']} (2 blocks, FFN {setup['ffn']}, tower"
        f" {' x '.join(map(str, setup['tower']))}), history 100, on synthetic logs of"
        f" {setup['items']:,} items and {setup['categories']:,} categories: smaller than the"
        f" canonical ranker, {setup['epochs']} epochs, then {setup['tune_epochs']} epoch of"
        " fine-tuning for each row alike. Each target among 50 candidates (49 by popularity), the"
        " same for all rows. *Long*: neither the item nor its category is among the newest"
        f" {NEAR} events, but among the older ones. Kept: share of the dense row, 95 % interval of"
        f" {RESAMPLES:,} paired bootstrap resamples of the users; one seed. The pattern is that of"
        " the encoder; the candidates' cross attention sees all positions in every row.",
    ]
    for world, result in worlds.items():
        users, card = result["users"], result["machine"]
        lines += [
            "",
            f"## {world}: {users['all']:,} test users, {users['long']:,} in the long slice",
            "",
            ", ".join(filter(None, (card.get("cpu"), card.get("date"), card.get("commit")))) + ".",
            "",
            "| attention | HR@10 | NDCG@10 | MRR | HR@10 kept | HR@10, long | HR@10 kept, long |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["variants"]:
            cells = [f"{row['all'][metric]['value']:.4f}" for metric in METRICS]
            for label in slices_of(row):
                share = row[label]["hit_rate_10"]["kept"]
                if label == "long":
                    cells.append(f"{row[label]['hit_rate_10']['value']:.4f}")
                cells.append(shown(share))
            lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
        lines.append("")
        for row in result["variants"]:
            if row["variant"] == SPARSE:
                for label in slices_of(row):
                    share = row[label]["hit_rate_10"]["kept"]
                    reached = share is not None and share["share"] >= GOAL
                    lines.append(
                        f"- {SPARSE} keeps >= {GOAL:.0%} of HR@10 ({label}):"
                        f" {shown(share, 4)}, {'reached' if reached else 'missed'}"
                    )
        if result["missing"]:
            lines += ["", f"Not measured: {', '.join(result['missing'])}."]
    for name in WorldName:
        if name.value not in worlds:
            lines += ["", f"Not measured: the {name.value} world."]
    return "\n".join([*lines, "", "![share kept](long_range.png)", ""])


def slices_of(row: dict[str, Any]) -> list[str]:
    """The slices of users that a row has metrics of."""
    return [label for label in ("all", "long") if label in row]


def _plot(worlds: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 1.1 * len(worlds)), layout="constrained")
    labels: list[str] = []
    for world, result in worlds.items():
        for row in result["variants"]:
            if row["variant"] not in PATTERNS or row["variant"] == "dense":
                continue
            for label in slices_of(row):
                colour = {"all": "C0", "long": "C3"}[label]
                share = row[label]["hit_rate_10"]["kept"]
                if share is None:
                    continue
                error = [[share["share"] - share["low"]], [share["high"] - share["share"]]]
                axes.errorbar(
                    share["share"], len(labels), xerr=error, fmt="o", capsize=3, color=colour
                )
                labels.append(f"{world}: {row['variant']}, {label} users")
    axes.axvline(1, color="grey", linewidth=1)
    axes.axvline(GOAL, color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("share of the dense model's HR@10, 95 % paired interval")
    figure.savefig(path, dpi=110)
    plt.close(figure)


app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for data, models and ranks.")],
    world: Annotated[WorldName, typer.Option(help="Which synthetic log.")] = WorldName.small,
    users: Annotated[int, typer.Option(help="Users of the log.")] = Setup.users,
    epochs: Annotated[int, typer.Option(help="Epochs of the dense model.")] = Setup.epochs,
    d: Annotated[int, typer.Option(help="Width of the model.")] = Setup.d,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = Setup.seed,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train, fine-tune and test; again, to go on where a run was interrupted."""
    torch.set_num_threads(threads)
    setup = Setup(users=users, epochs=epochs, d=d, seed=seed)
    run_world(world.value, out / world.value, setup, progress=not quiet)


@app.command()
def report(
    runs: Annotated[Path, typer.Option(help="Folder that run wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for long_range.{md,json,png}.")],
) -> None:
    """Write the report; a world that RUNS does not hold stays as an earlier report in OUT has it,
    and what is not measured yet is named as missing."""
    earlier = out / "long_range.json"
    known = json.loads(earlier.read_text()) if earlier.exists() else {}
    worlds = {name.value: read_world(runs / name.value) for name in WorldName}
    measured = {n: result or known.get(n) for n, result in worlds.items() if result or n in known}
    if len({json.dumps(result["setup"]) for result in measured.values()}) > 1:
        raise typer.BadParameter("the worlds were run with different sizes: run both alike")
    if not measured:
        raise typer.BadParameter(f"{runs} holds no tested dense model: run this first")
    out.mkdir(parents=True, exist_ok=True)
    (out / "long_range.json").write_text(json.dumps(measured, indent=1) + "\n")
    (out / "long_range.md").write_text(_markdown(measured))
    _plot(measured, out / "long_range.png")
    Console().print(f"Wrote {out / 'long_range.md'}")


if __name__ == "__main__":
    app()

"""``sasrec.{md,json,png}`` from what ``experiments.sasrec`` and ``experiments.variants`` wrote.

``python -m experiments.report --data ml-1m.txt --base RUN --runs RUN/variants --out docs/results``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.histories import Histories
from experiments.ranking import kept, shown
from experiments.variants import LEVELS, VARIANTS, read
from fastrec.measure.machine import machine_card
from fastrec.train import Evaluation, load_model
from fastrec.train.checkpoint import read_tensors
from fastrec.train.metrics import RESAMPLES

METRICS = ("hit_rate_10", "ndcg_10", "hit_rate_50", "ndcg_50", "mrr")
TITLES = {"hit_rate_10": "HR@10", "ndcg_10": "NDCG@10", "hit_rate_50": "HR@50",
          "ndcg_50": "NDCG@50", "mrr": "MRR"}  # fmt: skip
# Quality that the baseline has to reach, and the share of it that a variant has to keep.
BASELINE_GOALS = {"hit_rate_10": 0.31, "ndcg_10": 0.178, "hit_rate_50": 0.57}
KEPT_GOALS: dict[str, tuple[float, tuple[str, ...]]] = {
    "40 % pruned + int8": (0.995, ("hit_rate_50", "ndcg_50", "mrr")),
    "75 % pruned + int8": (0.99, ("hit_rate_50", "ndcg_50", "mrr")),
    "75 % pruned + int8, layers spared": (0.99, ("hit_rate_50", "ndcg_50", "mrr")),
    "window 32 + log2": (0.99, ("hit_rate_10",)),
    "distilled, a fifth of the parameters": (0.994, ("hit_rate_50", "ndcg_50", "mrr")),
    "distilled, a fifth of the parameters, longer": (0.994, ("hit_rate_50", "ndcg_50", "mrr")),
}
BYTES_GOAL = 0.15
STUDENT, PARAMETERS_GOAL = "distilled, a fifth of the parameters", 0.2
CONTROL = "control"
# Whose kept shares the table and the plot show; the JSON has all.
COLUMNS = ("hit_rate_10", "hit_rate_50", "ndcg_50", "mrr")
OF_CONTROL = ("hit_rate_50", "mrr")

Found = dict[str, tuple[Evaluation, Evaluation, dict[str, Any]]]


def _row(name: str, found: Found, base: str) -> dict[str, Any]:
    (result, seen, run), (baseline, _, full) = found[name], found[base]
    control = found.get(CONTROL, (None,))[0]
    return {
        "variant": name,
        "metrics": {m: result.metrics[m] for m in METRICS},
        "ci95": {m: result.ci95[m] for m in METRICS},
        "seen_items_ranked_too": {m: seen.metrics[m] for m in METRICS},
        "kept": {m: kept(result, baseline, m) for m in METRICS},
        "kept_of_control": None if control is None
        else {m: kept(result, control, m) for m in METRICS},
        "bytes": run["bytes"],
        "bytes_share": run["bytes"] / full["bytes"],
        "parameters_share": run["parameters"] / full["parameters"],
        "run": run,
    }  # fmt: skip


def _verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line a goal: reached or missed, and what was measured."""
    lines = []
    base = rows["baseline"]["metrics"]
    for metric, goal in BASELINE_GOALS.items():
        word = "reached" if base[metric] >= goal else "missed"
        lines.append(f"- baseline {TITLES[metric]} >= {goal}: {base[metric]:.4f}, {word}")
    for name, (goal, metrics) in KEPT_GOALS.items():
        for metric in metrics if name in rows else ():
            share = rows[name]["kept"][metric]
            word = "reached" if share is not None and share["share"] >= goal else "missed"
            lines.append(f"- {name}, {TITLES[metric]} kept >= {goal}: {shown(share, 4)}, {word}")
    for name in ("40 % pruned + int8", "75 % pruned + int8"):
        if name in rows:
            share = rows[name]["bytes_share"]
            word = "reached" if share <= BYTES_GOAL else "missed"
            lines.append(f"- {name}, bytes <= {BYTES_GOAL:.0%} of fp32: {share:.1%}, {word}")
    if STUDENT in rows:
        share = rows[STUDENT]["parameters_share"]
        word = "reached" if share <= PARAMETERS_GOAL else "missed"
        lines.append(f"- {STUDENT}: {share:.1%}, {word}")
    return lines


def _markdown(report: dict[str, Any]) -> str:
    rows = {row["variant"]: row for row in report["variants"]}
    card, training = report["machine"], report["baseline"]
    lines = [
        "# SASRec, each technique alone and together",
        "",
        f"{report['data']['users']:,} users, {report['data']['items']:,} items, leave-one-out, "
        "ranked over the whole catalogue without the items of the user's own history; "
        f"max length {report['data']['max_length']}. "
        f"Baseline: width {report['model']['d']}, {report['model']['parameters']:,} parameters, "
        f"{training['epochs']} epochs, epoch {training['best_epoch'] + 1} picked by validation. "
        f"Kept: share of the baseline's metric, with the 95 % interval of {RESAMPLES:,} paired "
        "bootstrap resamples of the users; one seed. Epochs: of fine-tuning, rounds of pruning "
        "included; rate: its peak; teacher: share of the baseline's scores in the target. The "
        "control is the dense fp32 model fine-tuned likewise: what it gains over the baseline is "
        f"the training's merit, no technique's. INT8 codes reach {LEVELS}. "
        f"{card.get('cpu', '')}; report written at commit {card.get('commit')}.",
        "",
        "| variant | layers, table pruned | epochs | rate | teacher | dropout | "
        + " | ".join(TITLES[m] for m in METRICS)
        + "".join(f" | {TITLES[m]} kept" for m in COLUMNS)
        + "".join(f" | {TITLES[m]} of the control's" for m in OF_CONTROL)
        + " | parameters | bytes of fp32 |",
        "|---|" + "---|" * (len(METRICS) + len(COLUMNS) + len(OF_CONTROL) + 7),
    ]  # fmt: skip
    for row in rows.values():
        tuned = [f"{row['run']['variant'][of]:g}" for of in ("lr", "share", "dropout")]
        made = row["run"]["variant"]
        share, table = made["sparsity"], made.get("table_sparsity")
        pruned = f"{share:.0%}, {share if table is None else table:.0%}" if share else "-"
        values = [pruned, f"{row['run']['epochs']:g}", *(tuned if row["run"]["epochs"] else "---")]
        values += [f"{row['metrics'][m]:.4f}" for m in METRICS]
        values += [shown(row["kept"][metric]) for metric in COLUMNS]
        control = row["kept_of_control"]
        values += [shown(None if control is None else control[m]) for m in OF_CONTROL]
        values.append(f"{row['parameters_share']:.1%}")
        values.append(f"{row['bytes_share']:.1%}")
        lines.append(f"| {row['variant']} | " + " | ".join(values) + " |")
    missing = [v.name for v in VARIANTS if v.name not in rows]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    lines += ["", "## Goals", "", *_verdicts(rows), "",
              "With the items seen ranked too, the baseline's are: "
              + ", ".join(f"{TITLES[m]} {v:.4f}" for m, v in
                          rows["baseline"]["seen_items_ranked_too"].items()) + ".", "",
              "![share kept](sasrec.png)", ""]  # fmt: skip
    return "\n".join(lines)


def _plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["variants"][1:]
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(rows) + 1.5), layout="constrained")
    for offset, metric in zip((-0.27, -0.09, 0.09, 0.27), COLUMNS, strict=True):
        found = [(i + offset, row["kept"][metric]) for i, row in enumerate(rows)]
        found = [(place, share) for place, share in found if share is not None]
        share = [s["share"] for _, s in found]
        below = [s["share"] - s["low"] for _, s in found]
        above = [s["high"] - s["share"] for _, s in found]
        places = [place for place, _ in found]
        axes.errorbar(share, places, xerr=[below, above], fmt="o", capsize=3, label=TITLES[metric])
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the fp32 baseline's metric, 95 % paired interval")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="The file that the runs were made on.")],
    base: Annotated[Path, typer.Option(help="Folder of experiments.sasrec train.")],
    runs: Annotated[Path, typer.Option(help="Folder of experiments.variants.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
) -> None:
    """Write the report; what is not measured yet is named as missing."""
    histories = Histories.read(data)
    found = read(runs, histories)
    if "baseline" not in found:
        raise typer.BadParameter(f"{runs} holds no baseline: run experiments.variants first")
    _, state = read_tensors(base / "checkpoint.safetensors", "checkpoint")
    state = state.get("state", state)
    model: Any = load_model(base / "model.safetensors")
    report = {
        "machine": machine_card(),
        "data": {"users": len(histories.users()), "items": histories.n_items - 1,
                 "max_length": histories.max_length},
        "baseline": {"epochs": state["config"]["epochs"], "best_epoch": state["best_epoch"],
                     "settings": state["config"], "history": state["history"]},
        "model": {"d": model.config.d, "parameters": found["baseline"][2]["parameters"]},
        "variants": [_row(name, found, "baseline") for name in found],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "sasrec.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (out / "sasrec.md").write_text(_markdown(report))
    _plot(report, out / "sasrec.png")


if __name__ == "__main__":
    app()

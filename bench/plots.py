"""A roofline a thread count, and how much faster than the fastest rival each case is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from measuring import KERNEL, OURS

Row = dict[str, Any]
# Sorted ops take the palette's colours in turn, the same in every plot.
PALETTE = pyplot.get_cmap("tab10").colors
PRECISIONS = {"fp32": "o", "bf16": "s", "int8": "^"}


def draw(report: dict[str, Any], out: Path) -> list[Path]:
    """Writes the PNG files and returns their paths."""
    ops = sorted({row["op"] for row in report["rows"]})
    colours = {op: PALETTE[i % len(PALETTE)] for i, op in enumerate(ops)}
    paths = []
    for threads, ceilings in report["ceilings"].items():
        rows = [r for r in report["rows"] if "limit_us" in r and r["threads"] == int(threads)]
        if rows:
            path = out / f"kernels_roofline_{threads}.png"
            _roofline(rows, ceilings, int(threads), colours, path)
            paths.append(path)
    path = out / "kernels_speedup.png"
    _speedups(report["rows"], colours, path)
    return [*paths, path]


def _roofline(
    rows: list[Row], ceilings: dict[str, Any], threads: int, colours: dict[str, Any], path: Path
) -> None:
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    # Cases that move bytes and compute nothing have no place on a logarithmic axis.
    rows = [row for row in rows if row["operations"]]
    x = np.geomspace(
        min([0.05, *(row["intensity"] / 2 for row in rows)]),
        max([1000, *(row["intensity"] * 2 for row in rows)]),
        200,
    )
    top = max(ceilings["peaks"].values())
    for name, gbs in ceilings["levels"].items():
        axes.plot(x, np.minimum(x * gbs, top), color="0.6", linewidth=1)
        axes.annotate(
            f"{name} {gbs:.0f} GB/s",
            (x[0], x[0] * gbs),
            fontsize=8,
            color="0.35",
            xytext=(3, 3),
            textcoords="offset points",
        )
    for name, gops in ceilings["peaks"].items():
        if gops:
            axes.axhline(gops, color="0.3", linewidth=1, linestyle="--")
            axes.annotate(
                f"{name} peak {gops:.0f} GOPS",
                (x[-1], gops),
                fontsize=8,
                ha="right",
                xytext=(-3, 3),
                textcoords="offset points",
            )
    for op, precision in sorted({(row["op"], row["precision"]) for row in rows}):
        mine = [row for row in rows if (row["op"], row["precision"]) == (op, precision)]
        axes.scatter(
            [row["intensity"] for row in mine],
            [row["gops"] for row in mine],
            color=colours[op],
            marker=PRECISIONS[precision],
            label=f"{op} ({precision})",
            zorder=3,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte",
        ylabel="10^9 operations a second",
        title=f"Roofline, {threads} thread{'s' * (threads > 1)}",
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _speedups(rows: list[Row], colours: dict[str, Any], path: Path) -> None:
    """One bar a case: the fastest rival that does the same work and was right."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "us" not in row or row["engine"] in (OURS, KERNEL) or row.get("other_work"):
            continue
        key = (row["op"], row["case"], row["mode"], row["threads"])
        if key not in best or row["us"]["p50"] < best[key]["us"]["p50"]:
            best[key] = row
    bars = list(best.values())[::-1]
    figure, axes = pyplot.subplots(
        figsize=(12, 1.5 + 0.24 * max(len(bars), 1)), layout="constrained"
    )
    values = np.array([row["fastrec_is_faster_by"]["x"] for row in bars])
    spans = np.array([row["fastrec_is_faster_by"]["ci95"] for row in bars]).reshape(-1, 2)
    errors = np.abs(spans.T - values)
    axes.barh(
        range(len(bars)),
        values,
        xerr=errors,
        color=[colours[row["op"]] for row in bars],
        error_kw={"linewidth": 1},
    )
    for i, row in enumerate(bars):
        axes.annotate(
            f" {values[i]:.1f}x {row['engine']}", (spans[i, 1], i), fontsize=7, va="center"
        )
    axes.set_yticks(
        range(len(bars)),
        [
            f"{r['op']} {r['case']}{' fwd+bwd' if r['mode'] == 'training' else ''}, {r['threads']}T"
            for r in bars
        ],
        fontsize=7,
    )
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set(xscale="log", title="Times faster than the fastest rival that does the same work")
    axes.margins(x=0.25)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

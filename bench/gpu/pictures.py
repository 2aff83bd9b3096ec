"""How much faster ours is than each rival, and how near the roofline: two PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from gpu.page import ceilings_of

Row = dict[str, Any]


def draw(report: dict[str, Any], out: Path) -> list[Path]:
    """Writes what there are rows for and returns the paths."""
    rows = report["rows"]
    compared = [row for row in rows if row.get("fastrec_is_faster_by")]
    timed = [row for row in rows if row.get("device_us") and row.get("macs")]
    paths = []
    if compared:
        paths.append(_speedups(compared, report["gpu"], out / "gpu_speedups.png"))
    if timed and {"copy", "bf16"} <= set(ceilings_of(rows)):
        paths.append(_roofline(timed, ceilings_of(rows), report["gpu"], out / "gpu_roofline.png"))
    return paths


def _speedups(rows: list[Row], gpu: str, path: Path) -> Path:
    rows = [row for row in rows if not row["engine"].startswith("fastrec")][::-1]
    values = np.array([row["fastrec_is_faster_by"]["x"] for row in rows])
    spans = np.array([row["fastrec_is_faster_by"]["ci95"] for row in rows]).reshape(-1, 2)
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.26 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), values, xerr=np.abs(spans.T - values), color="tab:blue")
    axes.set_yticks(range(len(rows)), [f"{r['what']}: {r['engine']}" for r in rows], fontsize=7)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set(xscale="log", title=f"Device time of others over ours, {gpu}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _roofline(rows: list[Row], ceilings: dict[str, float], gpu: str, path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    ours = [row for row in rows if row["engine"].startswith("fastrec")]
    x = np.geomspace(0.5, 8000, 200)
    for name, style in (("bf16", "-"), ("int8", "--")):
        if name in ceilings:
            y = np.minimum(x * ceilings["copy"], ceilings[name]) / 1e12
            axes.plot(
                x, y, color="0.5", linestyle=style, label=f"{name} product and copy, measured"
            )
    for dtype, marker in (("bf16", "s"), ("int8", "^"), ("fp32", "o")):
        mine = [row for row in ours if row["dtype"] == dtype]
        intensity = [2 * row["macs"] / max(row["moved"], 1) for row in mine]
        reached = [row["gop_per_s"] / 1e3 for row in mine]
        axes.scatter(intensity, reached, marker=marker, label=dtype, zorder=3)
        for row, *at in zip(mine, intensity, reached, strict=True):
            axes.annotate(
                row["what"][:44], at, fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="10^12 operations a second"
    )
    axes.set_title(f"Roofline, {gpu}")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path

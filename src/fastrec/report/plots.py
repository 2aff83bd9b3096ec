"""Latency, throughput, quality and resources as PNG (the paper's figures 5 to 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrec.plotting import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    figure,
    plain,
    png,
)
from fastrec.report.layout import (
    METRIC_TITLES,
    VARIANT_TITLES,
    Group,
    batches_of,
    group_rows,
    native_rows,
    number,
)
from fastrec.report.schema import VARIANTS

COLOURS = {
    "native": ORANGE,
    "torch": GREY,
    "torch_compile": PINK,
    "onnxruntime": SKY,
    "openvino": BLUE,
    "litert": GREEN,
    "cuda": AMBER,
    "tensorrt": YELLOW,
}
_BAR = 0.8
_GAP = 1.0


def _places(groups: Sequence[Group]) -> tuple[list[float], list[tuple[float, str]]]:
    """y of each bar, and (y, title) of each variant's heading; variants are set apart."""
    places: list[float] = []
    titles: list[tuple[float, str]] = []
    y, previous = 0.0, None
    for group in groups:
        if group.variant != previous:
            y += _GAP if previous else 0
            titles.append((y, VARIANT_TITLES[group.variant]))
            y += _GAP
            previous = group.variant
        places.append(y)
        y += 1
    return places, titles


def _bars(
    axis: Any,
    groups: Sequence[Group],
    values: Sequence[float | None],
    tails: Sequence[float | None],
    label: str,
    *,
    log: bool = True,
) -> None:
    places, titles = _places(groups)
    for group, y, value, tail in zip(groups, places, values, tails, strict=True):
        if value is None:
            axis.text(0.01, y, "not measured", transform=axis.get_yaxis_transform(), va="center",
                      fontsize=7, color="#777777", style="italic")  # fmt: skip
            continue
        mine = group.engine == "native"
        axis.barh(y, value, _BAR, color=COLOURS[group.engine], alpha=1 if mine else 0.85)
        end = value
        if tail is not None and tail > value:
            axis.plot([value, tail], [y, y], color="#222222", linewidth=1)
            axis.plot([tail], [y], marker="|", color="#222222", markersize=6)
            end = tail
        axis.annotate(number(value), (end, y), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=7, fontweight="bold" if mine else None)  # fmt: skip
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (1.9 if log else 1.15))
    axis.set_yticks(places, [group.title for group in groups], fontsize=8)
    for y, title in titles:
        axis.text(0.01, y, title, transform=axis.get_yaxis_transform(), va="center",
                  fontsize=8.5, fontweight="bold")  # fmt: skip
    axis.set_ylim(max(places) + 1, -1)
    axis.set_xlabel(label, fontsize=9)
    plain(axis, "x")


def _height(groups: Sequence[Group]) -> float:
    return 1.2 + 0.24 * (_places(groups)[0][-1] + 2)


def plot_latency(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Median and 99th percentile of every row, one panel a batch size (figure 5 of the paper)."""
    groups, sizes = group_rows(rows), batches_of(rows)
    made, axes = figure(1.8 + 4.2 * len(sizes), _height(groups), len(sizes), share_y=True)
    for axis, size in zip(axes, sizes, strict=True):
        values = [group.p(size) for group in groups]
        tails = [group.p(size, "p99") for group in groups]
        _bars(axis, groups, values, tails, f"latency of one call, batch {size} [ms], log scale")
    made.suptitle("Latency: bar = median, line = to the 99th percentile (lower is better)")
    return made


def plot_throughput(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Saturated requests per second of every engine (figure 6 of the paper)."""
    groups = group_rows(rows)
    made, axes = figure(8, _height(groups), 1, share_y=True)
    values = [group.any_row["throughput_rps"] for group in groups]
    _bars(axes[0], groups, values, [None] * len(groups), "requests per second, log scale")
    made.suptitle("Throughput when kept busy (higher is better)")
    return made


def plot_accuracy(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Metrics of the variants on the native engine with 95 % intervals (figure 7 of the paper)."""
    found = native_rows(rows)
    names = [n for n in ("hit_rate_10", "ndcg_10", "mrr", "hit_rate_50", "ndcg_50")
             if any(row[n] is not None for row in found.values())]  # fmt: skip
    made, axes = figure(2.4 + 2.3 * max(1, len(names)), 3.2, max(1, len(names)), share_y=True)
    variants = [v for v in VARIANTS if v in found]
    for axis, name in zip(axes, names, strict=False):
        for y, variant in enumerate(variants):
            value = found[variant][name]
            if value is None:
                continue
            low, high = found[variant]["ci95"].get(name, (value, value))
            colour = "#555555" if variant == "baseline" else COLOURS["native"]
            axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=colour,
                          capsize=3, markersize=5)  # fmt: skip
            axis.annotate(f"{value:.3f}", (value, y), xytext=(0, 6), textcoords="offset points",
                          ha="center", fontsize=7.5)  # fmt: skip
            if variant == "baseline":
                axis.axvline(value, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_title(METRIC_TITLES[name], fontsize=10)
        protocol = next((r["protocol"][name] for r in found.values() if name in r["protocol"]), "")
        axis.set_xlabel(protocol.split(" (")[0], fontsize=8)
        axis.set_yticks(range(len(variants)), [VARIANT_TITLES[v] for v in variants], fontsize=8.5)
        axis.set_ylim(len(variants) - 0.5, -0.7)
        axis.margins(x=0.15)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", linewidth=0.5, alpha=0.4)
    made.suptitle("Recommendation quality, native engine, 95 % intervals (higher is better)")
    return made


def plot_resources(rows: Sequence[Mapping[str, Any]]) -> Any:
    """File size and peak memory of every engine (figure 7 of the paper)."""
    groups = group_rows(rows)
    made, axes = figure(10.5, _height(groups), 2, share_y=True)
    for axis, name, label in (
        (axes[0], "size_mb", "model file [MB]"),
        (axes[1], "rss_mb", "peak resident memory of a process of its own [MB]"),
    ):
        values = [group.any_row[name] for group in groups]
        _bars(axis, groups, values, [None] * len(groups), label, log=False)
    made.suptitle("Resources (lower is better)")
    return made


PLOTS = {
    "latency": plot_latency,
    "throughput": plot_throughput,
    "accuracy": plot_accuracy,
    "resources": plot_resources,
}


def write_plots(rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, bytes]:
    """Write ``latency.png`` and the other plots into ``out``; name -> PNG bytes."""
    return {name: png(plot(rows), out / f"{name}.png") for name, plot in PLOTS.items()}

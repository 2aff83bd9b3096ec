"""A load test's report: terminal, plots, one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastrec.plotting import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, figure, plain, png
from fastrec.report.html import image, page, table
from fastrec.report.markdown import facts
from fastrec.serving.load.results import warnings

_HEADER = (
    "offered /s", "goodput /s", "in SLO", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms",
    "tries", "not answered",
)  # fmt: skip
# Columns that fit a terminal of 80 characters.
_SHORT = ("offered /s", "goodput /s", "in SLO", "p50 ms", "p99 ms", "tries", "not answered")
_COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, GREY)


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of figures as text, in the order of the tables' header."""
    latency = row["latency_ms"] or {}
    refused = ", ".join(f"{name} {count}" for name, count in sorted(row["refused"].items()))
    return [
        f"{row['offered_rps']:.1f}",
        f"{row['goodput_rps']:.1f}",
        "-" if row["attainment"] is None else f"{row['attainment']:.2%}",
        *(
            f"{latency[name]:.2f}" if name in latency else "-"
            for name in ("p50", "p90", "p99", "p99.9", "max")
        ),
        "-" if row["tries"] is None else f"{row['tries']:.2f}",
        refused or "none",
    ]


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Everything, each tier, each stage where there are several."""
    made = [["all", "", *cells(result["all"])]]
    if len(result["tiers"]) > 1:
        made += [["tier", name, *cells(row)] for name, row in result["tiers"].items()]
    if len(result["stages"]) > 1:
        for stage in result["stages"]:
            to = "" if stage["to"] is None else f" to {stage['to']:g}"
            made.append(["stage", f"{stage['rate']:g}{to} /s", *cells(stage)])
    return made


def summary_line(result: Mapping[str, Any]) -> str:
    """A run in a sentence."""
    row, generator = result["all"], result["generator"]
    text = (
        f"{row['offered']} requests in {result['seconds']:g} s ({row['offered_rps']:.1f} /s); "
        f"{row['goodput_rps']:.1f} /s answered within {result['plan']['slo_ms']:g} ms; the "
        f"generator took {generator['cpu_us_a_try']:.0f} us a request, "
        f"{generator['cores']:.2f} cores"
    )
    if generator["lag_ms"] is not None:
        text += f", and sent {generator['lag_ms']['p99']:.2f} ms late at p99"
    if result.get("capacity_rps") is not None:
        text = f"Capacity {result['capacity_rps']:.1f} requests a second. {text}"
    return text


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """The table on a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"Load test of {result['target']}")
    for name in ("", ""):
        shown.add_column(name, no_wrap=True)
    for name in _SHORT[:-1]:
        shown.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    shown.add_column(_SHORT[-1])
    places = [2 + _HEADER.index(name) for name in _SHORT]
    previous = "all"
    for row in rows(result):
        if row[0] != previous:
            shown.add_section()
            previous = row[0]
        shown.add_row(*row[:2], *(row[i] for i in places))
    console.print(shown)
    console.print(summary_line(result))
    for text in warnings(result):
        console.print(text, style="yellow")


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    made, (axis,) = figure(9, 3.6)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    plain(axis)
    return made, axis


def plot_latency(result: Mapping[str, Any]) -> Any:
    """p50 and p99 of each tier over time."""
    made, axis = _axes(
        "Latency by tier, from the moment each request was due", "seconds", "ms, log scale"
    )
    series = result["series"]
    for colour, name in zip(_COLOURS * 9, result["tiers"], strict=False):
        for quantile, style in (("p50", ":"), ("p99", "-")):
            points = [
                (s["at_s"], s["tiers"][name]["latency_ms"][quantile])
                for s in series
                if s["tiers"][name]["latency_ms"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.3,
                          label=f"{name} {quantile}")  # fmt: skip
    slo = result["plan"]["slo_ms"]
    axis.axhline(slo, color="#222222", linewidth=0.8, linestyle="--", label=f"goal {slo:g} ms")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    _legend(axis)
    return made


def plot_percentiles(result: Mapping[str, Any]) -> Any:
    """Latency at each percentile, towards the tail."""
    made, axis = _axes("Percentiles by tier", "percentile (spread towards 100)", "ms, log scale")
    for colour, (name, curve) in zip(_COLOURS * 9, result["curve"].items(), strict=False):
        inner = [(q, ms) for q, ms in curve if q < 100]
        axis.plot(
            [1 / (1 - q / 100) for q, _ in inner], [ms for _, ms in inner], color=colour, label=name
        )
    axis.set_xscale("log")
    marks = (0, 50, 90, 99, 99.9, 99.99)
    axis.set_xticks([1 / (1 - q / 100) for q in marks], [f"{q:g}" for q in marks])
    axis.minorticks_off()
    axis.axhline(result["plan"]["slo_ms"], color="#222222", linewidth=0.8, linestyle="--")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    _legend(axis)
    return made


def plot_goodput(result: Mapping[str, Any]) -> Any:
    """Offered and good over time; good against offered, where there are stages."""
    stages = result["stages"]
    if len(stages) < 2:
        made, axis = _axes("Offered rate and goodput", "seconds", "requests a second")
        at = [s["at_s"] for s in result["series"]]
        for name, colour in (("offered_rps", "#999999"), ("goodput_rps", GREEN)):
            axis.plot(at, [s[name] for s in result["series"]], color=colour, label=name[:-4])
    else:
        made, axis = _axes(
            "Goodput against the offered rate, a point a stage", "offered /s", "good /s"
        )
        points = sorted((s["offered_rps"], s["goodput_rps"]) for s in stages)
        axis.plot(*zip(*points, strict=True), "o-", color=GREEN, label="goodput")
        top = points[-1][0]
        axis.plot([0, top], [0, top], ":", color="#999999", label="all of it")
    axis.set_ylim(bottom=0)
    _legend(axis)
    return made


def plot_outcomes(result: Mapping[str, Any]) -> Any:
    """Requests by outcome over time: answered in time, late, and refused by reason."""
    made, axis = _axes("Outcomes", "seconds", "requests a second")
    series, width = result["series"], result["bin_s"]
    names = sorted({name for s in series for name in s["refused"]})
    layers: list[tuple[str, str, list[float]]] = [
        ("in time", GREEN, [s["in_slo"] / width for s in series]),
        ("late", "#F0E442", [(s["answered"] - s["in_slo"]) / width for s in series]),
    ]
    for colour, name in zip(_COLOURS[1:2] + _COLOURS[3:] + _COLOURS, names, strict=False):
        layers.append((name, colour, [s["refused"].get(name, 0) / width for s in series]))
    at = [s["at_s"] for s in series]
    base = [0.0] * len(at)
    for name, colour, values in layers:
        axis.bar(at, values, width, bottom=base, color=colour, label=name, align="edge")
        base = [b + v for b, v in zip(base, values, strict=True)]
    _legend(axis)
    return made


def _legend(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


PLOTS = {
    "latency": ("Latency by tier over time", plot_latency),
    "percentiles": ("Percentiles", plot_percentiles),
    "goodput": ("Goodput", plot_goodput),
    "outcomes": ("Outcomes and reasons", plot_outcomes),
}


def render_html(result: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """One page, no script, no network."""
    notes = "".join(f'<p class="note">{escape(text)}.</p>' for text in warnings(result))
    plan: Sequence[tuple[str, str]] = [
        (name, json.dumps(value)) for name, value in result["plan"].items()
    ]
    sections = [
        ("Figures", notes + table(["", "", *_HEADER], rows(result))),
        *((title, image(name, images)) for name, (title, _) in PLOTS.items()),
        ("Plan", table(["", ""], plan)),
        ("Machine", table(["", ""], facts(result["machine"]))),
    ]
    title = f"Load test of {result['target']}"
    return page(f"fastrec: {title}", title, summary_line(result), sections)


def write_report(result: Mapping[str, Any], out: Path) -> Path:
    """``loadtest.json`` and ``loadtest.html`` in a folder; the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "loadtest.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    images = {name: png(plot(result)) for name, (_, plot) in PLOTS.items()}
    path = out / "loadtest.html"
    path.write_text(render_html(result, images))
    return path

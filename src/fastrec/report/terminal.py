"""The table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastrec.report.layout import (
    ENGINE_TITLES,
    METRIC_TITLES,
    VARIANT_TITLES,
    batches_of,
    comparison_with_paper,
    group_rows,
    native_rows,
    number,
    reasons,
    share,
)
from fastrec.report.markdown import cell_list, protocol_notes, ratio_lines
from fastrec.report.schema import ACCURACY


def render_variant(variant: str, found: Mapping[str, Any], console: Console) -> None:
    """Print how fast a variant is on each engine, fastest first: before the report is there."""
    timed = {n: e["latency"] for n, e in found["engines"].items() if e["latency"]}
    if not timed:
        return
    sizes = sorted({int(size) for latency in timed.values() for size in latency})
    title = f"{VARIANT_TITLES[variant]}: p50 of a call in ms"
    table = Table("engine", title=title, box=box.SIMPLE_HEAD)
    for size in sizes:
        table.add_column(f"B={size}", justify="right")
    first = str(sizes[0])
    for name in sorted(timed, key=lambda name: timed[name].get(first, {"p50": math.inf})["p50"]):
        engine, precision = name.rsplit("-", 1)
        cells = [number(timed[name].get(str(size), {"p50": None})["p50"]) for size in sizes]
        style = "bold" if engine == "native" else None
        table.add_row(f"{ENGINE_TITLES[engine]} {precision}", *cells, style=style)
    console.print(table)


def render_terminal(report: Mapping[str, Any], console: Console) -> None:
    """Print speed, quality and the paper's figures; a null is a dash with its reason below."""
    rows = report["rows"]
    console.print(report["summary"])
    sizes = batches_of(rows)
    speed = Table(title="Table I, measured: latency and resources", box=box.SIMPLE_HEAD)
    speed.add_column("variant")
    speed.add_column("engine")
    for size in sizes:
        speed.add_column(f"B={size}\np50 ms", justify="right")
        speed.add_column("\np99 ms", justify="right", style="dim")
    for title in ("req/s", "file MB", "RSS MB"):
        speed.add_column(title, justify="right")
    previous = None
    for group in group_rows(rows):
        if previous not in (None, group.variant):
            speed.add_section()
        row = group.any_row
        cells = [number(group.p(size, p)) for size in sizes for p in ("p50", "p99")]
        cells += [number(row[name]) for name in ("throughput_rps", "size_mb", "rss_mb")]
        name = VARIANT_TITLES[group.variant] if group.variant != previous else ""
        style = "bold" if group.engine == "native" else None
        speed.add_row(name, group.title, *cells, style=style)
        previous = group.variant
    console.print(speed)
    for line in ratio_lines(report["ratios"]):
        console.print(f"  {line}")

    quality = Table(title="Recommendation quality (native engine)", box=box.SIMPLE_HEAD)
    quality.add_column("variant")
    for name in ACCURACY:
        quality.add_column(METRIC_TITLES[name], justify="right")
    for variant, row in native_rows(rows).items():
        quality.add_row(VARIANT_TITLES[variant], *(share(row[name]) for name in ACCURACY))
    console.print(quality)
    for note in protocol_notes(list(native_rows(rows).values())):
        console.print(f"  {note}", style="dim")

    paper = Table(title="Beside the paper's Table I", box=box.SIMPLE_HEAD)
    for title in ("variant", "column", "the paper", "this run"):
        paper.add_column(title)
    previous = None
    for variant, column, theirs, ours in comparison_with_paper(rows):
        name = VARIANT_TITLES[variant] if variant != previous else ""
        paper.add_row(name, column, theirs, ours, end_section=column == "hit rate")
        previous = variant
    console.print(paper)
    for why, cells in reasons(rows).items():
        console.print(f"  - {why}: {cell_list(cells, 2)}", style="dim")

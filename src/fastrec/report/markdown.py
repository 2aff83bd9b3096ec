"""``table1.md``: every row, the ratios, the paper's figures, and the reasons of all nulls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastrec.report.layout import (
    METRIC_TITLES,
    VARIANT_TITLES,
    comparison_with_paper,
    group_rows,
    native_rows,
    number,
    reasons,
    share,
    signed,
)
from fastrec.report.paper import GENERAL, TITLE
from fastrec.report.schema import ACCURACY


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first two are right-aligned."""
    rule = ["---" if i < 2 else "--:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def speed_rows(rows: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    """The cells of the speed table, one list a row of ``table1.json``."""
    for group in group_rows(rows):
        for batch, row in sorted(group.by_batch.items()):
            latency = row["latency_ms"]
            yield [
                VARIANT_TITLES[group.variant],
                group.title,
                str(batch),
                str(row["threads"]),
                *(number(latency[p]) for p in ("p50", "p95", "p99")),
                number(row["throughput_rps"]),
                number(row["params_m"]),
                number(row["nonzero_params_m"]),
                number(row["size_mb"]),
                number(row["rss_mb"]),
            ]


SPEED_HEADER = [
    "variant",
    "engine",
    "batch",
    "threads",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "requests/s",
    "params M",
    "non-zero M",
    "file MB",
    "peak RSS MB",
]


def accuracy_rows(rows: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    """Accuracy with 95 % intervals, one list a variant and engine that was evaluated."""
    for group in group_rows(rows):
        row = group.any_row
        if all(row[name] is None for name in ACCURACY):
            continue
        cells = [share(row[name], row["ci95"].get(name)) for name in ACCURACY]
        yield [VARIANT_TITLES[group.variant], group.title, *cells]


def difference_rows(rows: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    """Paired differences to the baseline, one list a compressed variant (native engine)."""
    for variant, row in native_rows(rows).items():
        if row["difference"]:
            cells = [signed(row["difference"].get(name)) for name in ACCURACY]
            yield [VARIANT_TITLES[variant], "native - baseline", *cells]


def protocol_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each protocol that the metrics were taken under, on native and on rivals."""
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        who = "native" if row["engine"] == "native" else "other engines"
        for name, protocol in row["protocol"].items():
            names = notes.setdefault((who, protocol), [])
            if METRIC_TITLES[name] not in names:
                names.append(METRIC_TITLES[name])
    return [f"{who}, {', '.join(names)}: {text}" for (who, text), names in notes.items()]


def ratio_lines(ratios: Sequence[Mapping[str, Any]]) -> list[str]:
    """``pruned_quantized, B=1: native / OpenVINO int8 = 0.71 [0.70, 0.73]``."""
    lines = []
    for r in ratios:
        head = f"{VARIANT_TITLES[r['variant']]}, batch {r['batch']}: "
        if r["ratio"] is None:
            lines.append(head + f"no ratio: {r['why']}")
            continue
        low, high = r["ci95"]
        lines.append(
            f"{head}native {number(r['native_ms'])} ms / {r['rival']} {number(r['rival_ms'])} ms"
            f" = {r['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        )
    return lines


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += facts(value, f"{name}.")
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(str(v) for v in value)))
        else:
            pairs.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return pairs


def cell_list(cells: Sequence[str], shown: int = 6) -> str:
    """A list of cells, cut where it is long."""
    more = len(cells) - shown
    return "; ".join(cells[:shown]) + (f"; and {more} more" if more > 0 else "")


def render_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    rows = report["rows"]
    metrics = [METRIC_TITLES[name] for name in ACCURACY]
    settings = {(g.variant, g.title): g.any_row["settings"] for g in group_rows(rows)}
    parts = [
        "# Table I, measured",
        report["summary"],
        "## Speed and resources",
        table(SPEED_HEADER, speed_rows(rows)),
        "`-`: not measured; the reasons are below. requests/s: the engine's best when kept busy, "
        "the same on all its rows.",
        "## INT8: native against the best rival (ratio of median latencies, 95 % interval)",
        "\n".join(f"- {line}" for line in ratio_lines(report["ratios"])) or "No INT8 rows.",
        "## Recommendation quality (95 % bootstrap intervals over users)",
        table(["variant", "engine", *metrics], accuracy_rows(rows)),
        "\n".join(f"- {note}" for note in protocol_notes(rows)),
        "### Paired difference to the baseline",
        table(["variant", "", *metrics], difference_rows(rows)),
        "## Beside the paper's Table I",
        table(
            ["variant", "column", "the paper", "this run"],
            [(VARIANT_TITLES[v], c, p, o) for v, c, p, o in comparison_with_paper(rows)],
        ),
        f"The paper: {TITLE}. "
        + "; ".join(f"{f.variant}: {f.column} {f.text} ({f.source})" for f in GENERAL)
        + f". {report['paper']['why']}.",
        "## What each engine ran",
        table(
            ["variant", "engine", "settings"], [(v, t, text) for (v, t), text in settings.items()]
        ),
        "## Not measured, and why",
        "\n".join(f"- {why}: {cell_list(cells)}" for why, cells in reasons(rows).items())
        or "Every cell was measured.",
        "## Machine",
        table(["", ""], facts(report["machine"])),
        "## Data and models",
        table(["", ""], [*facts(report["dataset"], "data."), *facts(report["run"], "run.")]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"

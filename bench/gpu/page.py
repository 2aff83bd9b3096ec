"""The report for people."""

from __future__ import annotations

from typing import Any

from gpu.goals import GOALS

Row = dict[str, Any]


def ceilings_of(rows: list[Row]) -> dict[str, float]:
    """Bytes a second of a copy; operations a second by type."""
    return {row["ceiling"]: row["per_s"] for row in rows if "ceiling" in row}


def judged(rows: list[Row]) -> list[dict[str, Any]]:
    """Every goal's line."""
    return [goal.judge(rows, ceilings_of(rows)) for goal in GOALS]


def markdown(report: dict[str, Any]) -> str:
    """Goals, figures by section, what was run, and what of it failed."""
    rows = report["rows"]
    lines = [f"# {report['gpu'] or 'No GPU: no figure was measured'}", ""]
    lines += [f"- {name}: {value}" for name, value in report["versions"].items()]
    units = {"copy": "GB/s"}
    lines += [
        f"- ceiling, {name}: {value / 1e9:,.0f} {units.get(name, 'Gop/s')}"
        for name, value in ceilings_of(rows).items()
    ]
    lines += ["", "| goal | bound | measured | |", "|---|---|---|---|"]
    for line in report["goals"]:
        value = "" if line["measured"] is None else f"{line['measured']:.4g}"
        lines.append(f"| {line['goal']} | {line['bound']} | {value} | {line['verdict']} |")
    lines += [""]
    for section in report["sections"]:
        lines += _section(section, [r for r in rows if r["section"] == section["name"]])
    return "\n".join(lines) + "\n"


def _section(section: Row, rows: list[Row]) -> list[str]:
    lines = [f"## {section['name']}", ""]
    lines.append(f"{section['seconds']:.0f} s{': ' + section['why'] if section.get('why') else ''}")
    measured = [row for row in rows if "bound_us" in row]
    if measured:
        lines += ["", "| what | engine | device us | host us | GB/s | Gop/s | ours is faster by |"]
        lines[-1] += " H200 bound us | |"
        lines.append("|---|---|---|---|---|---|---|---|---|")
        lines += [_figures(row) for row in measured]
    others = [row for row in rows if "what" in row and "bound_us" not in row]
    lines += ["", *(_other(row) for row in others)] if others else []
    return [*lines, ""]


def _figures(row: Row) -> str:
    keys = ("device_us", "host_us", "gb_per_s", "gop_per_s")
    cells = [row["what"], row["engine"]]
    cells += ["" if row.get(key) is None else f"{row[key]:.4g}" for key in keys]
    faster = row.get("fastrec_is_faster_by")
    cells.append(
        ""
        if faster is None
        else f"{faster['x']:.2f} ({faster['ci95'][0]:.2f}-{faster['ci95'][1]:.2f})"
    )
    cells += [f"{row['bound_us']:.3g}", row.get("why") or row.get("note", "")]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _other(row: Row) -> str:
    left_out = ("section", "what", "engine", "kernels")
    rest = ", ".join(f"{k} {v}" for k, v in row.items() if k not in left_out and v not in ([], ""))
    return f"- {row['what']}: {rest}"

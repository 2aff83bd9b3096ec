"""The report as Markdown."""

from __future__ import annotations

import json
from typing import Any

from measuring import KERNEL, OURS

Row = dict[str, Any]


def markdown(report: dict[str, Any]) -> str:
    """Goals, the roofline of our kernels, then every engine of every case."""
    settings, machine = report["settings"], report["machine"]
    lines = [
        "# Kernels",
        "",
        f"{machine['cpu']}, {machine['cores_usable']} cores. Medians of up to {settings['rounds']} "
        "interleaved rounds; intervals are 95 %. How it is measured: [README.md](README.md).",
        "",
        *_ceilings(report["ceilings"]),
        *_goals(report["goals"]),
        *_roofline(report["rows"]),
        *_engines(report["rows"]),
        "## Machine",
        "",
        "```json",
        json.dumps(machine, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _ceilings(ceilings: dict[str, Any]) -> list[str]:
    names = list(next(iter(ceilings.values()))["levels"])
    lines = [
        "| cores at once | fp32 GFLOPS | bf16 GFLOPS | int8 GOPS | "
        + " | ".join(f"{name} GB/s" for name in names)
        + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for threads, found in ceilings.items():
        figures = [*found["peaks"].values(), *found["levels"].values()]
        lines.append(f"| {threads} | " + " | ".join(f"{x:.0f}" for x in figures) + " |")
    return [*lines, ""]


def _goals(goals: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Goals",
        "",
        "At the limit: the value if our kernel ran at the roofline of this run, its operations at "
        "the measured peak or its bytes at the read bandwidth of a working set of that size.",
        "",
        "| goal | bound | measured | verdict | at the limit |",
        "|---|---|---|---|---|",
    ]
    for goal in goals:
        if goal["measured"] is None:
            lines.append(f"| {goal['goal']} | {goal['bound']} | | not measured | |")
            continue
        low, high = goal["ci95"]
        limit = "" if goal["limit"] is None else f"{goal['limit']:.2f} "
        lines.append(
            f"| {goal['goal']} | {goal['bound']} | {goal['measured']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {goal['verdict']} | {limit}({goal['limited_by']}) |"
        )
    return [*lines, ""]


def _roofline(rows: list[Row]) -> list[str]:
    lines = [
        "## Roofline of our kernels",
        "",
        "Operations are multiply-adds counted twice, only those that the op asks for; bytes are "
        "what must be read and written once; shares are of the peak of the precision and of the "
        "read bandwidth of a working set of that size, both measured beside the case. Kernel "
        "alone: into a given output, without torch's layer; goals that are shares of a ceiling, or "
        "gains by threads, take that row.",
        "",
        "| op, case | threads | MOP | KB | OP/byte | p50 us | GOPS | of peak | GB/s | of bandwidth "
        "| limit us | of limit |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        if "limit_us" not in row:
            continue
        alone = ", kernel alone" if row["engine"] == KERNEL else ""
        peak = "" if row["peak_share"] is None else f"{row['peak_share']:.0%} {row['precision']}"
        lines.append(
            f"| {row['op']} {row['case']}{alone} | {row['threads']} | "
            f"{row['operations'] / 1e6:.3g} | "
            f"{row['bytes'] / 1e3:.3g} | {row['intensity']:.3g} | {row['us']['p50']:.1f} | "
            f"{row['gops']:.3g} | {peak} | {row['gbs']:.3g} | {row['bandwidth_share']:.0%} | "
            f"{row['limit_us']:.3g} ({row['limited_by']}) | "
            f"{row['limit_us'] / row['us']['p50']:.0%} |"
        )
    return [*lines, ""]


def _engines(rows: list[Row]) -> list[str]:
    lines = [
        "## Every engine",
        "",
        "| op, case | threads | engine | p50 us | p99 us | error | fastrec is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mode = ", forward + backward" if row["mode"] == "training" else ""
        head = f"| {row['op']} {row['case']}{mode} | {row['threads']} | {row['engine']}"
        if work := row.get("other_work"):
            head += f" (other work: {work})"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        if "us" not in row:
            lines.append(f"{head} | | | {error} | not timed: {row['why_not_timed']} |")
            continue
        faster = row["fastrec_is_faster_by"]
        low, high = faster["ci95"]
        gain = "" if row["engine"] == OURS else f"{faster['x']:.2f}x [{low:.2f}, {high:.2f}]"
        lines.append(
            f"{head} | {row['us']['p50']:.1f} | {row['us']['p99']:.1f} | {error} | {gain} |"
        )
    return [*lines, ""]

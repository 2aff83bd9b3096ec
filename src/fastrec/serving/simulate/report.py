"""Simulations as tables, JSON and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.plotting import figure, png
from fastrec.serving.simulate.fleet import Fleet, Outcome

# Okabe-Ito: told apart by readers with any colour vision, and in print.
_COLOURS = {"probes": "#D55E00", "random": "#999999", "round_robin": "#56B4E9", "least": "#0072B2"}


def row(fleet: Fleet, outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """Results of the simulated cells together, and their spread."""
    cells = [outcome.to_dict() for outcome in outcomes]
    together = Outcome.joined(outcomes)
    p99 = [c["latency_ms"]["p99"] for c in cells if c["latency_ms"] is not None]
    return {
        "policy": fleet.policy,
        "rate": fleet.rate,
        **together.to_dict(),
        "p99_ms_by_cell": p99,
        "in_goal_share_by_cell": [c["in_goal_share"] for c in cells],
        "simulated_share": fleet.sampled,
        "requests_a_second_of_the_simulation": together.offered / wall_s,
        "wall_s": wall_s,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| policy | requests/s | answered | in goal | p50 ms | p99 ms | p99.9 ms "
        "| busy (least..most host) | most open on a host |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ms, used = r["latency_ms"] or {}, r["utilisation"]
        times = " | ".join(f"{ms[q]:.2f}" if q in ms else "-" for q in ("p50", "p99", "p99.9"))
        lines.append(
            f"| {r['policy']} | {r['rate']:,.0f} | {r['answered_share']:.2%} | "
            f"{r['in_goal_share']:.2%} | {times} | {used['mean']:.0%} ({used['least']:.0%}.."
            f"{used['most']:.0%}) | {r['most_open_on_a_host']} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], goal_ms: float, path: str | Path) -> None:
    """Latency percentiles of each row, and the share within the goal by rate, as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    made, (left, right) = figure(10, 4, 2)
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    for policy in policies:
        mine = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["rate"])
        colour = _COLOURS.get(policy)
        rates = np.array([r["rate"] for r in mine])
        for q, style in (("p50", ":"), ("p99", "-")):
            ms = [(r["latency_ms"] or {}).get(q, float("nan")) for r in mine]
            label = f"{policy.replace('_', ' ')}, {q}"
            left.plot(rates, ms, style, marker="o", color=colour, label=label)
        share = [100 * r["in_goal_share"] for r in mine]
        right.plot(rates, share, marker="o", color=colour, label=policy.replace("_", " "))
    left.axhline(goal_ms, color="black", linewidth=0.8, linestyle="--")
    left.set_ylabel("ms from sending to answer")
    right.set_ylabel(f"% of requests answered within {goal_ms:g} ms")
    for axes in (left, right):
        axes.set_xlabel("requests a second")
        axes.set_ylim(bottom=0)
        axes.legend()
    png(made, path)

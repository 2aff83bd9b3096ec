"""serving.json, serving.md and serving.png from the pieces of bench_serving.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS = {"gold": 0.5, "silver": 0.3, "bulk": 0.2}
# A call of the other queues lasts so long at most: a quarter of the goal.
CAP_MS = 12.5
LOADS = {
    "canonical": "one user, 50 candidates",
    "eight": "eight users, 50 candidates each",
    "heavy": "one user, 100 to 1,000 candidates, Pareto 1.5",
}
# Refused with a reason before it was run, or given up by the client at its deadline.
SHED = {"overload", "queue_full", "deadline_infeasible", "expired", "timeout"}
# Rivals' loads, in C.
FACTORS = {"tenth": 0.1, "quarter": 0.25, "half": 0.5, "nearly": 0.95, "double": 2.0}

Row = tuple[str, str, str, bool]


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def goals(done: Mapping[str, Any], load: str) -> list[Row]:
    """What, goal, measured, reached: of one load."""
    rows: list[Row] = []
    if (steady := done.get(f"steady_{load}")) is not None:
        c = steady["capacity_rps"]
        half, nearly = steady["half"]["all"], steady["nearly"]
        p50, p99 = half["latency_ms"]["p50"], half["latency_ms"]["p99"]
        if load != "heavy":
            engine = steady["engine_ms"]["p50"]
            over = p50 - engine
            rows.append(("0.5 C: p50 over the engine", "<= 0.6 ms", f"{over:.2f} ms", over <= 0.6))
            rows.append(("0.5 C: p99 / p50", "<= 3", f"{p99 / p50:.1f}", p99 <= 3 * p50))
        share = nearly["all"]["attainment"]
        rows.append(("0.95 C: in time", ">= 99 %", f"{share:.2%}", share >= 0.99))
        alone = steady["unloaded"]["all"]["latency_ms"]["p99"]
        express = nearly["tiers"]["express"]["latency_ms"]["p99"]
        rows.append(
            (
                "0.95 C: express p99 - unloaded p99",
                f"<= {CAP_MS:g} ms",
                f"{express - alone:.1f} ms ({express:.1f}, {alone:.1f})",
                express <= alone + CAP_MS,
            )
        )
        for name, title, goal in (("double", "2 C", 0.9), ("fivefold", "5 C", 0.8)):
            kept = steady[name]["all"]["goodput_rps"] / c
            rows.append((f"{title}: goodput", f">= {goal:.2f} C", f"{kept:.2f} C", kept >= goal))
        gold = steady["double"]["tiers"]["gold"]["attainment"]
        rows.append(("2 C: gold, inside its share", ">= 99 %", f"{gold:.2%}", gold >= 0.99))
        five = steady["fivefold"]["tiers"]
        total = sum(t["answered"] for t in five.values())
        shares = {name: t["answered"] / max(total, 1) for name, t in five.items()}
        worst = max(abs(shares[name] - weight) for name, weight in WEIGHTS.items())
        told = ", ".join(f"{name} {100 * value:.0f}" for name, value in shares.items())
        rows.append(
            ("5 C: admitted shares (weights 50, 30, 20)", "within 5 points", told, worst <= 0.05)
        )
        bulk = min(
            steady[name]["tiers"]["bulk"]["answered"] / max(steady[name]["all"]["answered"], 1)
            for name in ("double", "fivefold")
        )
        rows.append(("2 C and 5 C: bulk", ">= 10 %", f"{bulk:.0%}", bulk >= 0.1))
    if (recovery := done.get(f"recovery_{load}")) is not None:
        seconds = recovery["recovery_s"]
        rows.append(
            (
                "30 s of 3 C, clients that retry: back in",
                "<= 5 s",
                "never" if seconds is None else f"{seconds:.2g} s",
                seconds is not None and seconds <= 5,
            )
        )
    return rows


def faults(done: Mapping[str, Any]) -> list[Row]:
    """The killed engine and the bad versions."""
    rows: list[Row] = []
    if (kill := done.get("kill")) is not None:
        refused = kill["all"]["refused"]
        lost = sum(n for reason, n in refused.items() if reason not in SHED)
        what = "engine killed at 0.7 C: accepted requests that failed"
        rows.append((what, "0", str(lost), lost == 0))
        over = kill["around_kill_max_ms"] - kill["before_p99_ms"]
        rows.append(
            (
                "the same: slowest request in flight, over p99 before",
                "<= 100 ms",
                f"{over:.0f} ms ({kill['around_kill']} in flight)",
                over <= 100,
            )
        )
    for fault, title in (("slow", "twice as slow"), ("fails", "fails 1 in 20")):
        if (grey := done.get("grey")) is None:
            continue
        ends = [s for s in grey[fault]["steps"] if s.get("action") in ("rollback", "promote")]
        windows = ends[-1]["windows"] if ends else None
        good = bool(ends) and ends[-1]["action"] == "rollback" and windows <= 2
        told = f"{ends[-1]['action']} after {windows}" if ends else "no verdict"
        rows.append((f"grey release, {title}: windows", "rolled back in <= 2", told, good))
    return rows


def _table(rows: list[Row]) -> list[str]:
    lines = ["| what | goal | measured | |", "|---|---|---|---|"]
    return lines + [f"| {what} | {goal} | {got} | {_verdict(ok)} |" for what, goal, got, ok in rows]


def _figures(name: str, row: Mapping[str, Any]) -> str:
    latency = row["all"]["latency_ms"] or {}
    times = " | ".join(f"{latency[q]:.1f}" if q in latency else "-" for q in ("p50", "p99", "max"))
    refused = ", ".join(f"{k} {v}" for k, v in sorted(row["all"]["refused"].items())) or "-"
    generator, others = row["generator"], row.get("other_cores")
    other = "-" if others is None else f"{others:.2f}"
    return (
        f"| {name} | {row['all']['offered_rps']:.0f} | {row['all']['goodput_rps']:.0f} | "
        f"{row['all']['attainment']:.2%} | {times} | {row['server_cores']:.2f} | "
        f"{generator['cores']:.2f} | {other} | {generator['lag_ms']['p99']:.1f} | "
        f"{refused} |"
    )


def markdown(done: Mapping[str, Any]) -> str:
    """The report for people."""
    machine = next(iter(done.values()))["machine"]
    lines = [
        "# Serving under load",
        "",
        f"{machine['cpu']}, {machine['cores_usable']} cores, commit {machine.get('commit')}. The "
        "canonical ranker, 40 % pruned, INT8, one engine of one thread, over gRPC and loopback; "
        "goal 50 ms. C: the highest Poisson rate at which 99 % are answered in time. Server, "
        "engine and generator share the cores: the tables have what each took, and what else ran "
        "(-: not known). Clients go away at the goal (gRPC's deadline): timeout.",
        "",
    ]
    for load, title in LOADS.items():
        if (steady := done.get(f"steady_{load}")) is None:
            continue
        engine = steady["engine_ms"]
        lines += [
            f"## Requests of {title}",
            "",
            f"C = {steady['capacity_rps']:.0f} a second; the engine alone takes "
            f"{engine['p50']:.2f} ms (p50, p99 {engine['p99']:.2f}).",
            "",
            *_table(goals(done, load)),
            "",
            "| load | offered /s | good /s | in time | p50 ms | p99 ms | max ms | server and "
            "engine, cores | generator, cores | others, cores | sent late, p99 ms | refused |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        names = ("unloaded", "half", "nearly", "double", "fivefold", "after")
        titles = ("0.05 C, express", "0.5 C", "0.95 C", "2 C", "5 C", "0.5 C again")
        lines += [_figures(t, steady[n]) for n, t in zip(names, titles, strict=True)]
        if f"recovery_{load}" in done:
            lines.append(_figures("0.7 C, 3 C, 0.7 C, retries", done[f"recovery_{load}"]))
        rivals = (("fifo", "one FIFO queue"), ("ray", "Ray Serve, @serve.batch"))
        for kind, title in rivals:
            found = done.get(f"{kind}_{load}", {})
            lines += [
                _figures(f"{title}: {factor} C", found[n])
                for n, factor in FACTORS.items()
                if n in found
            ]
        lines.append("")
    rows = faults(done)
    if rows:
        lines += ["## Faults", "", *_table(rows), ""]
        if (kill := done.get("kill")) is not None:
            lines += [
                f"Two engine processes and a warm spare; C = {kill['capacity_rps']:.0f} of that "
                f"set-up. In the two seconds after the kill {kill['first_2s_after']:.1%} were in "
                "time.",
                "",
            ]
    lines += [
        "Triton's own queue policies (queue size, timeout, delay, priority levels) pass through "
        "its client in `tests/serving/test_queue_policy.py`.",
        "",
        "`.venv/bin/python bench/bench_serving.py --out DIR`",
        "",
    ]
    return "\n".join(lines)


def plot(done: Mapping[str, Any], path: Path) -> None:
    """Goodput and the p99 of the answers against the offered rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = [load for load in LOADS if f"steady_{load}" in done]
    figure = Figure(figsize=(9, 3.4 * len(loads)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(loads), 2, squeeze=False)
    for (left, right), load in zip(axes, loads, strict=True):
        c = done[f"steady_{load}"]["capacity_rps"]
        series = {
            "fastrec": (f"steady_{load}", "#D55E00", ("half", "nearly", "double", "fivefold")),
            "one FIFO queue": (f"fifo_{load}", "#0072B2", ("half", "nearly", "double")),
            "Ray @serve.batch": (f"ray_{load}", "#009E73", ("tenth", "quarter", "half", "nearly")),
        }
        for title, (piece, colour, names) in series.items():
            rows = [done[piece][n]["all"] for n in names if n in done.get(piece, {})]
            if not rows:
                continue
            x = [r["offered_rps"] / c for r in rows]
            left.plot(x, [r["goodput_rps"] / c for r in rows], "o-", color=colour, label=title)
            tails = [
                (a, r["latency_ms"]["p99"]) for a, r in zip(x, rows, strict=True) if r["latency_ms"]
            ]
            if tails:
                right.plot(*zip(*tails, strict=True), "o-", color=colour, label=title)
        left.set_title(f"Goodput, {LOADS[load]}", fontsize=9, loc="left")
        left.set_ylabel("answered in time / C")
        right.set_title("p99 of the answers, from when each was due", fontsize=9, loc="left")
        right.set_ylabel("ms, log scale")
        right.set_yscale("log")
        right.axhline(50, color="#222222", linewidth=0.8, linestyle="--")
        for axis in (left, right):
            axis.set_xlabel("offered / C")
            axis.grid(linewidth=0.5, alpha=0.4)
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def write(done: Mapping[str, Any], out: Path) -> None:
    """All three files."""
    if not any(name.startswith("steady") for name in done):
        return
    (out / "serving.json").write_text(json.dumps(done) + "\n")
    (out / "serving.md").write_text(markdown(done))
    plot(done, out / "serving.png")

"""A run's figures: by tier, by stage, second by second; plain JSON types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrec.serving.load.generator import OK, UNANSWERED, Generator

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_CURVE = (0, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99, 100)
# A generator that sends later than this has shaped the load itself.
LAG_LIMIT_MS = 5.0


def summary(generator: Generator, *, bin_s: float | None = None) -> dict[str, Any]:
    """The figures of a run.

    Latencies are of answers, from the moment a request was meant to be sent to its last answer,
    tries and pauses between them included. Goodput is answers within the goal.

    Args:
        bin_s: width of the series' bins; None = a second, or less so that there are 40.

    Returns:
        ``all``, ``tiers`` (name ->), ``stages`` (one each): offered, answered, in_slo, attainment
        (in_slo / offered), offered_rps, goodput_rps, latency_ms, refused (reason -> count), tries;
        ``series``: the same of each bin by the time that requests were due; ``curve``: percentile
        -> ms by tier; ``texts``: kind of refusal -> the words of the first one;
        ``generator``: its processor time and how late it sent.
    """
    plan, log, schedule = generator.plan, generator.log, generator.schedule
    seconds = plan.seconds
    latency = 1e3 * (log.done_s - schedule.at_s)
    good = log.outcome == log.outcomes.index(OK)
    groups = {m.tier or "default": schedule.mix == i for i, m in enumerate(plan.mix)}

    def row(chosen: np.ndarray, length_s: float) -> dict[str, Any]:
        offered, answered = int(chosen.sum()), chosen & good
        in_slo = int((latency[answered] <= plan.slo_ms).sum())
        counts = np.bincount(log.outcome[chosen], minlength=len(log.outcomes)).tolist()
        named = zip(log.outcomes, counts, strict=True)
        return {
            "offered": offered,
            "answered": int(answered.sum()),
            "in_slo": in_slo,
            "attainment": in_slo / offered if offered else None,
            "offered_rps": offered / length_s,
            "goodput_rps": in_slo / length_s,
            "latency_ms": _percentiles(latency[answered]),
            "refused": {name: n for name, n in named if n and name != OK},
            "tries": float(log.tries[chosen].mean()) if offered else None,
        }

    starts = np.concatenate([[0.0], np.cumsum([s.seconds for s in plan.stages])])
    width = min(1.0, max(seconds / 40, 0.1)) if bin_s is None else bin_s
    place = np.floor(schedule.at_s / width).astype(np.int64)
    series = []
    for i in range(int(np.ceil(seconds / width - 1e-9))):
        inside = place == i
        length_s = min(width, seconds - i * width)
        cell = row(inside, length_s)
        cell["tiers"] = {name: row(inside & own, length_s) for name, own in groups.items()}
        series.append({"at_s": i * width, **cell})
    lag = 1e3 * (log.sent_s - schedule.at_s)
    sent = ~np.isnan(lag)
    tries = max(int(log.tries.sum()), 1)
    return {
        "plan": dataclasses.asdict(plan),
        "seconds": seconds,
        "all": row(np.ones(len(schedule), bool), seconds),
        "tiers": {name: row(own, seconds) for name, own in groups.items()},
        "stages": [
            {"at_s": starts[i], "rate": s.rate, "to": s.to, **row(schedule.stage == i, s.seconds)}
            for i, s in enumerate(plan.stages)
        ],
        "series": series,
        "bin_s": width,
        "curve": {
            name: [[q, float(np.percentile(latency[own & good], q))] for q in _CURVE]
            for name, own in groups.items()
            if (own & good).any()
        },
        "texts": dict(log.texts),
        "generator": {
            "cpu_s": log.cpu_s,
            "cpu_us_a_try": 1e6 * log.cpu_s / tries,
            "cores": log.cpu_s / seconds,
            "lag_ms": _percentiles(lag[sent]),
            "kept_up": bool(sent.any() and np.percentile(lag[sent], 99) <= LAG_LIMIT_MS),
        },
    }


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(values, PERCENTILES)
    rows = {f"p{q:g}": float(v) for q, v in zip(PERCENTILES, found, strict=True)}
    return {**rows, "max": float(values.max())}


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Reasons to doubt a run's figures."""
    told = []
    generator = result["generator"]
    if not generator["kept_up"] and generator["lag_ms"] is not None:
        told.append(
            f"the generator sent late (p99 {generator['lag_ms']['p99']:.1f} ms): it, not the "
            "server, may be the limit"
        )
    lost = result["all"]["refused"].get(UNANSWERED, 0)
    if lost:
        told.append(f"{lost} requests were never answered")
    told += [f"the first {kind}: {text}" for kind, text in result["texts"].items()]
    return told

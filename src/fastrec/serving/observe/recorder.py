"""Counts the core's events: a few dict look-ups and additions each.

Metrics, Triton's statistics and the status page read the same counts. Labels are bounded: tiers,
queues and priorities are configured ones, model names are loaded ones, tenants never appear.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.events import (
    BatchDone,
    EngineChanged,
    Event,
    LimitChanged,
    RequestDone,
    RolloutChanged,
    Screened,
)

_EDGES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_ROW_EDGES = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MOST_SERIES = 4096
_WINDOW_S = 60
# Percentiles of the status page: 12 buckets a factor of two from 10 us, off by 3 % at most.
_FINE = tuple(1e-5 * 2 ** (i / 12) for i in range(12 * 20))


class Histogram:
    """Counts by upper edge, the last one open."""

    __slots__ = ("counts", "edges", "total")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values counted."""
        return sum(self.counts)


class _Second:
    """Counts of one second."""

    __slots__ = ("at", "latency", "outcomes", "rows")

    def __init__(self, at: int) -> None:
        self.at = at
        self.latency: dict[str, list[int]] = {}
        self.outcomes: dict[tuple[str, str], int] = defaultdict(int)
        self.rows = 0


class _Statistics:
    """A version's counts and seconds for Triton's ModelStatistics."""

    __slots__ = ("answered", "calls", "compute_s", "failed", "failed_s", "last_ms", "queue_s", "s")

    def __init__(self) -> None:
        self.last_ms = self.calls = self.answered = self.failed = 0
        self.s = self.queue_s = self.compute_s = self.failed_s = 0.0

    def row(self) -> dict[str, Any]:
        """In the protocol's names and nanoseconds. Triton's clients need equal counts of all kinds
        of computing; here copies in and out are part of the engine's call."""
        good = self.answered
        return {
            "last_inference": self.last_ms,
            "inference_count": good,
            "execution_count": self.calls,
            "inference_stats": {
                "success": (good, round(self.s * 1e9)),
                "fail": (self.failed, round(self.failed_s * 1e9)),
                "queue": (good, round(self.queue_s * 1e9)),
                "compute_input": (good, 0),
                "compute_infer": (good, round(self.compute_s * 1e9)),
                "compute_output": (good, 0),
            },
        }


class Recorder:
    """An observer of a core.

    Args:
        config: its tiers and goals; each latency goal is an edge of the buckets.
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        goals = {config.latency_s(tier) for tier in config.tiers} | {config.slo.latency_ms / 1e3}
        self.edges = tuple(sorted(goals | set(_EDGES)))
        self.requests: dict[tuple[str, str, str, str, str], Histogram] = {}
        self.queue: dict[tuple[str, str], Histogram] = {}
        self.batches: dict[tuple[str, str, str], Histogram] = {}
        self.batch_rows: dict[tuple[str, str, str], Histogram] = {}
        self.engine_errors: dict[tuple[str, str], int] = defaultdict(int)
        # Audits of screens, and the sum of their recalls.
        self.screens: dict[tuple[str, str], tuple[int, float]] = {}
        self.rollouts: dict[tuple[str, str], int] = defaultdict(int)
        self.limit_s, self.guard = 0.0, 1.0
        self.recent: deque[dict[str, Any]] = deque(maxlen=20)
        self._statistics: dict[tuple[str, str], _Statistics] = defaultdict(_Statistics)
        self._seconds: deque[_Second] = deque(maxlen=_WINDOW_S + 1)

    def on_event(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, RequestDone):
            self._request(event)
        elif isinstance(event, BatchDone):
            self._batch(event)
        elif isinstance(event, EngineChanged):
            if event.new == "READY":
                # A model that was never called has statistics, too.
                _ = self._statistics[event.model, event.version]
            self._note("engine", f"{event.engine}: {event.old} -> {event.new}", event.reason)
        elif isinstance(event, RolloutChanged):
            self.rollouts[event.model, event.action] += 1
            text = f"{event.model} {event.version}: {event.action}, weight {event.weight:g}"
            self._note("rollout", text, event.reason)
        elif isinstance(event, Screened):
            audits, total = self.screens.get((event.model, event.version), (0, 0.0))
            self.screens[event.model, event.version] = (audits + 1, total + event.recall)
        elif isinstance(event, LimitChanged):
            self.limit_s, self.guard = event.limit_s, event.guard

    def _request(self, event: RequestDone) -> None:
        ok = event.outcome == "ok"
        # A request for an unknown model has no version; its name is the client's invention.
        model = event.model if event.version or ok else "unknown"
        tier = event.tier if event.tier in self.config.tiers else "unknown"
        key = (model, event.version, tier, event.queue, event.outcome)
        histogram = self.requests.get(key)
        if histogram is None:
            if len(self.requests) >= _MOST_SERIES:
                return
            histogram = self.requests[key] = Histogram(self.edges)
        histogram.add(event.total_s)
        second = self._second()
        second.outcomes[tier, event.outcome] += 1
        statistics = self._statistics[model, event.version]
        if ok:
            waited = self.queue.get((model, event.queue))
            if waited is None:
                waited = self.queue[model, event.queue] = Histogram(self.edges)
            waited.add(event.queue_s)
            counts = second.latency.get(tier)
            if counts is None:
                counts = second.latency[tier] = [0] * (len(_FINE) + 1)
            counts[bisect_left(_FINE, event.total_s)] += 1
            second.rows += event.rows
            statistics.last_ms = time.time_ns() // 1_000_000
            statistics.answered += 1
            statistics.s += event.total_s
            statistics.queue_s += event.queue_s
            statistics.compute_s += event.compute_s
        else:
            statistics.failed += 1
            statistics.failed_s += event.total_s

    def _batch(self, event: BatchDone) -> None:
        key = (event.model, event.version, event.queue)
        if key not in self.batches:
            self.batches[key] = Histogram(self.edges)
            self.batch_rows[key] = Histogram(_ROW_EDGES)
        self.batches[key].add(event.seconds)
        self.batch_rows[key].add(event.rows)
        self._statistics[event.model, event.version].calls += 1
        if event.error:
            self.engine_errors[event.model, event.version] += 1

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        """Rows as Triton's ModelStatistics has them."""
        return [
            {"name": model, "version": known, **values.row()}
            for (model, known), values in self._statistics.items()
            if known and name in ("", model) and version in ("", known)
        ]

    def window(self, seconds: int = 10) -> dict[str, Any]:
        """The last whole seconds, in plain JSON types: rates, outcomes and latencies by tier."""
        now = int(time.monotonic())
        chosen = [s for s in self._seconds if now - seconds <= s.at < now]
        tiers: dict[str, dict[str, Any]] = {
            tier: {"per_s": 0.0, "goal_ms": 1e3 * self.config.latency_s(tier), "outcomes": {}}
            for tier in self.config.tiers
        }
        for second in chosen:
            for (tier, outcome), n in second.outcomes.items():
                row = tiers.setdefault(tier, {"per_s": 0.0, "goal_ms": None, "outcomes": {}})
                row["outcomes"][outcome] = row["outcomes"].get(outcome, 0) + n
                row["per_s"] += n / seconds
        for tier, row in tiers.items():
            found = [s.latency[tier] for s in chosen if tier in s.latency]
            counts = [sum(parts) for parts in zip(*found, strict=True)]
            for q in (50, 95, 99):
                row[f"p{q}_ms"] = _percentile_ms(counts, q)
        return {
            "seconds": seconds,
            "rows_per_s": sum(s.rows for s in chosen) / seconds,
            "tiers": tiers,
        }

    def series(self) -> list[dict[str, int]]:
        """Answered and refused requests of each of the last whole seconds, oldest first."""
        now = int(time.monotonic())
        by_time = {s.at: s for s in self._seconds}
        rows = []
        for at in range(now - _WINDOW_S, now):
            outcomes = by_time[at].outcomes if at in by_time else {}
            good = sum(n for (_, outcome), n in outcomes.items() if outcome == "ok")
            rows.append({"ok": good, "refused": sum(outcomes.values()) - good})
        return rows

    def _second(self) -> _Second:
        now = int(time.monotonic())
        if not self._seconds or self._seconds[-1].at != now:
            self._seconds.append(_Second(now))
        return self._seconds[-1]

    def _note(self, kind: str, text: str, reason: str) -> None:
        at = time.strftime("%H:%M:%S", time.gmtime())
        self.recent.append({"at": at, "kind": kind, "text": text, "reason": reason})


def _percentile_ms(counts: Sequence[int], q: float) -> float | None:
    total = sum(counts)
    if not total:
        return None
    left = q / 100 * total
    for i, n in enumerate(counts):
        left -= n
        if left <= 0:
            return 1e3 * _FINE[min(i, len(_FINE) - 1)]
    return 1e3 * _FINE[-1]

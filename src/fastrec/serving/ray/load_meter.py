"""A core's load over the last seconds."""

from __future__ import annotations

from collections import deque

from fastrec.serving.core.events import BatchDone, Event, RequestDone
from fastrec.serving.core.inference_core import InferenceCore

_WINDOW_S = 5.0
_MOST = 10_000


class LoadMeter:
    """An observer of a core."""

    def __init__(self, core: InferenceCore) -> None:
        self._core = core
        self._waits: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._calls: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def on_event(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, RequestDone):
            if event.outcome == "ok":
                self._waits.append((event.at, event.queue_s))
            elif event.outcome in ("overload", "queue_full", "deadline_infeasible", "expired"):
                # The refusal means that the wait would exceed the goal; count a full goal of delay.
                goal_s = self._core.config.latency_s(event.tier)
                self._waits.append((event.at, max(event.queue_s, goal_s)))
        elif isinstance(event, BatchDone):
            self._calls.append((event.at, event.seconds))

    def queue_delay_s(self) -> float:
        """95 of 100 requests waited no longer for an engine, in seconds; 0 without requests."""
        waits = sorted(wait for _, wait in self._recent(self._waits))
        return waits[min(int(0.95 * len(waits)), len(waits) - 1)] if waits else 0.0

    def busy(self) -> float:
        """The share of time that the engines were at work."""
        calls = self._recent(self._calls)
        if not calls:
            return 0.0
        full = len(self._calls) == _MOST
        span = self._core.clock.now() - calls[0][0] if full else _WINDOW_S
        engines = sum(info.engines.get("READY", 0) for info in self._core.models())
        return sum(seconds for _, seconds in calls) / max(span, 1e-3) / max(engines, 1)

    def wait_s(self) -> float:
        """Seconds that a new request would wait for the work in flight."""
        waits = [0.0]
        for versions in self._core.stats()["models"].values():
            for stats in versions.values():
                if stats.get("engines"):
                    work = stats["in_flight_s"] * stats["batch_gain"]
                    waits.append(work / len(stats["engines"]))
        return max(waits)

    def _recent(self, values: deque[tuple[float, float]]) -> list[tuple[float, float]]:
        oldest = self._core.clock.now() - _WINDOW_S
        while values and values[0][0] < oldest:
            values.popleft()
        return list(values)

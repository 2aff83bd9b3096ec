"""Events that the core reports to its observers (metrics, traces, tests).

Observers run in the core's thread on the request path, so they must return quickly.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class RequestDone(NamedTuple):
    """A request ended. ``outcome`` is "ok" or a ``Kind``'s value."""

    at: float
    model: str
    version: str
    tier: str
    queue: str
    priority: int
    outcome: str
    rows: int
    queue_s: float
    compute_s: float
    total_s: float
    id: str


class BatchDone(NamedTuple):
    """An engine has finished a batch, or failed on it (``error`` says how, "" = well)."""

    at: float
    model: str
    version: str
    engine: str
    queue: str
    requests: int
    rows: int
    seconds: float
    predicted_s: float
    error: str


class Screened(NamedTuple):
    """A screened call was scored whole too: the share of the best candidates that the screen had
    kept."""

    at: float
    model: str
    version: str
    recall: float


class EngineChanged(NamedTuple):
    """An engine went from one state of the pool to another."""

    at: float
    model: str
    version: str
    engine: str
    old: str
    new: str
    reason: str


class RolloutChanged(NamedTuple):
    """A version's share of the traffic changed; ``action`` is "start", "step", "promote" or
    "rollback"."""

    at: float
    model: str
    version: str
    action: str
    weight: float
    reason: str


class LimitChanged(NamedTuple):
    """The concurrency limit moved: engine seconds that may be in flight, and the guard's factor."""

    at: float
    limit_s: float
    guard: float
    reason: str


Event = RequestDone | BatchDone | Screened | EngineChanged | RolloutChanged | LimitChanged


class Observer(Protocol):
    """A subscriber to the core's events."""

    def on_event(self, event: Event) -> None:
        """Take note of ``event``; what it raises is logged and otherwise without effect."""

"""Requests, responses and refusals: the scheduler's inputs and outputs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastrec.errors import ServingError

# Triton's own texts: its clients and tests read them.
QUEUE_FULL = "Exceeds maximum queue size"
TIMED_OUT = "Request timeout expired"


class Kind(str, enum.Enum):
    """Why a request was not answered."""

    QUOTA = "quota"
    """The tenant has used up its share of engine time; ``retry_after_s`` says when to come back."""
    OVERLOAD = "overload"
    """The concurrency limit is reached, and the tier is beyond its share of it."""
    QUEUE_FULL = "queue_full"
    """The queue of the request's priority holds as many as it may."""
    DEADLINE_INFEASIBLE = "deadline_infeasible"
    """The work ahead would end after the deadline: refused before any is done."""
    EXPIRED = "expired"
    """The deadline passed while the request was queued."""
    NOT_READY = "not_ready"
    """The model is known and no engine of it can run."""
    NOT_FOUND = "not_found"
    """No such model or version."""
    INVALID = "invalid"
    """An input is wrong; the message names it."""
    CANCELLED = "cancelled"
    """The caller took the request back, or the core was closed."""
    INTERNAL = "internal"
    """The engine failed on this request."""

    def __str__(self) -> str:
        return self.value


class Rejected(ServingError):
    """A request was not answered.

    Attributes:
        kind: one of :class:`Kind`.
        retry_after_s: when the same request could succeed, in seconds, where that is known.
    """

    def __init__(self, kind: Kind, message: str, retry_after_s: float | None = None) -> None:
        self.kind, self.retry_after_s = kind, retry_after_s
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[Kind, str, float | None]]:
        return type(self), (self.kind, str(self), self.retry_after_s)


@dataclass(slots=True)
class Request:
    """One call of a model.

    Args:
        model: its name.
        version: "" for the one that the weights of the model's versions give.
        inputs: by name; users are the first dimension of each.
        rows: users x candidates, what batches are counted in; 0 = read from the inputs.
        priority: as Triton's: 1 is the highest, 0 the default level.
        deadline: seconds on the core's clock (``core.clock.now() + timeout``); None = the
            tier's latency goal.
        tier: one of the configured tiers; "" is the default one.
        tenant: whose quota is charged.
        id: the caller's, handed back in traces and errors.
    """

    model: str
    version: str
    inputs: dict[str, np.ndarray]
    rows: int = 0
    priority: int = 0
    deadline: float | None = None
    tier: str = ""
    tenant: str = ""
    id: str = ""


class LoadReport(NamedTuple):
    """Load of a model version.

    Attributes:
        in_flight: requests not answered yet.
        latency_s: until a new one would be.
        each_s: how much later each new one makes the next.
    """

    ready: bool
    in_flight: int
    latency_s: float = 0.0
    each_s: float = 0.0


@dataclass(slots=True)
class Timings:
    """Where a request's time went, in seconds.

    Args:
        queue_s: from admission to the start of the (last) batch that held a part of it.
        compute_s: the engine's time for that batch.
        total_s: from ``infer`` to the answer.
        batch_rows: rows of that batch.
        parts: batches that the request was split over.
        tries: 1, or more where an engine died and the request was run again.
        engine: name of the engine that ran it.
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    total_s: float = 0.0
    batch_rows: int = 0
    parts: int = 1
    tries: int = 1
    engine: str = ""


@dataclass(slots=True)
class Response:
    """The answer: outputs by name, and which version gave them."""

    outputs: dict[str, np.ndarray]
    model: str
    version: str
    timings: Timings = field(default_factory=Timings)

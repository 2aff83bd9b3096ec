"""Queues: tiers share the engines by weight, and within a tier the earliest deadline goes first.

A sub-request's order is its deadline, moved by its priority, and never later than its arrival plus
the ageing time, so later requests cannot pass it forever. Each tier has a virtual time that
advances by the engine time taken over its weight; the tier that is furthest behind is next. Counts
change at once when a sub-request leaves; its heap entries are dropped when they reach the head.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np

from fastrec.serving.core.request import Rejected, Request
from fastrec.serving.core.request_policy import RequestPolicy

QUEUED, RUNNING, DONE = 0, 1, 2
EXPRESS, STANDARD = "express", "standard"


@dataclass(slots=True, eq=False)
class PendingRequest:
    """An admitted request until it is answered. Times are seconds on the scheduler's clock.

    Args:
        request: what the caller asked.
        arrays: its inputs, in the model's order.
        done: called when it is answered or refused.
    """

    request: Request
    arrays: InitVar[tuple[np.ndarray, ...]]
    done: Callable[[PendingRequest], None]
    bytes: int = field(init=False)
    policy: RequestPolicy = field(init=False)
    tier: str = field(init=False)
    priority: int = field(init=False)
    users: int = field(init=False)
    candidates: int = field(init=False)
    rows: int = field(init=False)
    arrival: float = field(init=False)
    deadline: float = field(init=False)
    own_deadline: bool = field(init=False)
    order: float = field(init=False)
    cost_s: float = field(init=False)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    error: Rejected | None = None
    state: int = QUEUED
    queue: str = STANDARD
    tries: int = 1
    delayed: bool = False  # timed out under the DELAY policy
    # Admitted on an idle server: runs, even if the server's own goal passes meanwhile.
    guaranteed: bool = False
    started: float = 0.0
    compute_s: float = 0.0
    expected: float = 0.0
    batch_rows: int = 0
    engine: str = ""
    # Chunks of users, each of chunks of candidates.
    subs: list[list[SubRequest]] = field(default_factory=list)
    open_subs: int = 0
    sub_count: int = 0

    def __post_init__(self, arrays: tuple[np.ndarray, ...]) -> None:
        self.bytes = sum([a.nbytes for a in arrays])

    @property
    def waits(self) -> bool:
        """Whether it has not begun, or a piece of it waits again because its engine was lost."""
        if self.state == QUEUED:
            return True
        again = self.tries > 1 and self.state != DONE
        return again and any(sub.state == QUEUED for chunk in self.subs for sub in chunk)


@dataclass(slots=True, eq=False)
class SubRequest:
    """The unit of batching: a request, or a piece of a large one.

    Args:
        pending: the request.
        arrays: inputs of this piece.
        users, candidates: their sizes.
        key: equal for those that can share a call.
        cost_s: predicted engine seconds.
    """

    pending: PendingRequest
    arrays: tuple[np.ndarray, ...]
    users: int
    candidates: int
    key: Any
    cost_s: float
    state: int = QUEUED
    solo: bool = False
    avoid: Any = None
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


_Heap = list[tuple[float, int, SubRequest]]


class TierQueue:
    """The sub-requests of one tier that wait."""

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.passed = 0.0  # engine seconds over weight
        self.queued_s = 0.0
        self.in_flight_s = 0.0
        self.count = 0
        self.by_priority: dict[int, float] = {}
        self._all: _Heap = []
        self._by_key: dict[Any, _Heap] = {}
        self._made = itertools.count()

    def push(self, sub: SubRequest) -> None:
        """Queue a sub-request."""
        pending = sub.pending
        entry = (pending.order, next(self._made), sub)
        heapq.heappush(self._all, entry)
        heap = self._by_key.get(sub.key)
        if heap is None:
            heap = self._by_key[sub.key] = []
        heapq.heappush(heap, entry)
        self.count += 1
        self.queued_s += sub.cost_s
        self.by_priority[pending.priority] = (
            self.by_priority.get(pending.priority, 0.0) + sub.cost_s
        )

    def left(self, sub: SubRequest) -> None:
        """Update the counts: a queued sub-request was taken or removed."""
        self.count -= 1
        priority = sub.pending.priority
        if self.count:
            self.queued_s = max(self.queued_s - sub.cost_s, 0.0)
            self.by_priority[priority] = max(self.by_priority[priority] - sub.cost_s, 0.0)
        else:
            # Also drops rounding errors and entries of sub-requests that are gone.
            self.queued_s = 0.0
            self.by_priority.clear()
            self._all.clear()
            self._by_key.clear()

    def head(self) -> SubRequest | None:
        """The next sub-request."""
        return _head(self._all)

    def head_of(self, key: Any) -> SubRequest | None:
        """The next sub-request that can share a call with others of ``key``."""
        heap = self._by_key.get(key)
        if heap is None:
            return None
        sub = _head(heap)
        if sub is None:
            del self._by_key[key]
        return sub

    def drop(self, sub: SubRequest) -> None:
        """Drop dead entries at the heads (``sub`` was just taken)."""
        self.head_of(sub.key)
        _head(self._all)

    def ahead_s(self, priority: int) -> float:
        """Engine seconds queued that go before a new request of ``priority``."""
        if len(self.by_priority) <= 1:
            return self.queued_s
        return sum([cost for level, cost in self.by_priority.items() if level <= priority])


def _head(heap: _Heap) -> SubRequest | None:
    while heap:
        order, _, sub = heap[0]
        if sub.state == QUEUED and sub.pending.order == order:
            return sub
        heapq.heappop(heap)
    return None


class Queues:
    """The express queue and the tiers of one model version."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.tiers = {name: TierQueue(name, weight) for name, weight in weights.items()}
        self.express = TierQueue(EXPRESS, 1.0)
        self.count = 0
        self.bytes = 0
        self.by_priority: dict[int, int] = {}
        # Do not start until this many are queued (once; 0 = off).
        self.start_count = 0
        self._virtual = 0.0

    def queued_s(self) -> float:
        """Engine seconds of the sub-requests that wait, the express queue apart."""
        return sum([queue.queued_s for queue in self.tiers.values()])

    def of(self, pending: PendingRequest) -> TierQueue:
        """The queue of a request's sub-requests."""
        return self.express if pending.queue == EXPRESS else self.tiers[pending.tier]

    def enter(self, pending: PendingRequest) -> None:
        """Queue a request."""
        self.bytes += pending.bytes
        counts = self.by_priority
        counts[pending.priority] = counts.get(pending.priority, 0) + 1
        for chunk in pending.subs:
            for sub in chunk:
                self.push(sub)

    def leave(self, pending: PendingRequest) -> None:
        """A request leaves the queue: it starts, or was taken back."""
        self.bytes -= pending.bytes
        self.by_priority[pending.priority] -= 1

    def pass_by(self, sub: SubRequest) -> None:
        """:meth:`push` and :meth:`take` at once, for an empty queue."""
        queue = self.of(sub.pending)
        self._virtual = max(self._virtual, queue.passed)
        queue.passed = self._virtual + sub.cost_s / queue.weight
        sub.state = RUNNING

    def push(self, sub: SubRequest) -> None:
        """Queue a sub-request; a tier that was idle starts level with the others, not ahead."""
        queue = self.of(sub.pending)
        if not queue.count:
            queue.passed = max(queue.passed, self._virtual)
        queue.push(sub)
        self.count += 1

    def take(self, sub: SubRequest) -> None:
        """Move a sub-request from its queue into a batch."""
        queue = self.of(sub.pending)
        self._virtual = max(self._virtual, queue.passed)
        queue.passed += sub.cost_s / queue.weight
        sub.state = RUNNING
        queue.left(sub)
        queue.drop(sub)
        self.count -= 1

    def remove(self, sub: SubRequest) -> None:
        """Remove a queued sub-request."""
        sub.state = DONE
        self.of(sub.pending).left(sub)
        self.count -= 1

    def tier_next(self, aged_before: float) -> TierQueue | None:
        """The tier whose turn it is: one whose head arrived before ``aged_before``, else the one
        that is furthest below its share."""
        best, aged = None, None
        oldest = aged_before
        for queue in self.tiers.values():
            if not queue.count:
                continue
            head = queue.head()
            if head is not None and head.pending.arrival < oldest:
                aged, oldest = queue, head.pending.arrival
            if best is None or queue.passed < best.passed:
                best = queue
        return aged or best

    def heads(self, key: Any) -> Iterator[SubRequest]:
        """Sub-requests of ``key`` in the order of the tiers' turns; take each before the next."""
        while True:
            best: tuple[float, SubRequest] | None = None
            for queue in self.tiers.values():
                sub = queue.head_of(key) if queue.count else None
                behind = best is None or queue.passed < best[0]
                if sub is not None and not sub.solo and behind:
                    best = (queue.passed, sub)
            if best is None:
                return
            yield best[1]

"""Queues: tiers share the engines by weight, and within a tier the earliest deadline goes first.

A part's order is its deadline, moved by its priority, and never later than its arrival plus the
ageing time, so that later requests cannot pass it for ever. Across tiers, each has a virtual time
that advances by the engine time taken over the weight; the tier that is furthest behind is next.
Removal is at once for all counts; the heaps drop what is gone when they meet it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastrec.serving.core.request import Rejected, Request
from fastrec.serving.core.terms import Terms

QUEUED, RUNNING, DONE = 0, 1, 2
EXPRESS, STANDARD = "express", "standard"


class Ticket:
    """A request on its way."""

    __slots__ = (
        "arrival",
        "batch_rows",
        "bytes",
        "candidates",
        "compute_s",
        "cost_s",
        "deadline",
        "delayed",
        "done",
        "engine",
        "error",
        "expected",
        "lane",
        "open_parts",
        "order",
        "outputs",
        "parts",
        "pieces",
        "priority",
        "request",
        "rows",
        "started",
        "state",
        "terms",
        "tier",
        "tries",
        "users",
    )

    terms: Terms
    tier: str
    priority: int
    users: int
    candidates: int
    rows: int
    arrival: float
    deadline: float
    order: float
    cost_s: float

    def __init__(
        self, request: Request, arrays: tuple[np.ndarray, ...], done: Callable[[Ticket], None]
    ) -> None:
        self.request = request
        self.done = done
        self.outputs: dict[str, np.ndarray] = {}
        self.error: Rejected | None = None
        self.state = QUEUED
        self.lane = STANDARD
        self.tries = 1
        self.delayed = False  # timed out under the DELAY policy
        self.started = self.compute_s = self.expected = 0.0
        self.batch_rows = 0
        self.engine = ""
        self.bytes = sum([a.nbytes for a in arrays])
        # Chunks of users, each of chunks of candidates.
        self.parts: list[list[Part]] = []
        self.open_parts = self.pieces = 0


class Part:
    """What is batched: a request, or a piece of a large one."""

    __slots__ = (
        "arrays",
        "avoid",
        "candidates",
        "cost_s",
        "key",
        "outputs",
        "rows",
        "solo",
        "state",
        "ticket",
        "users",
    )

    def __init__(
        self,
        ticket: Ticket,
        arrays: tuple[np.ndarray, ...],
        users: int,
        candidates: int,
        key: Any,
        cost_s: float,
    ) -> None:
        self.ticket, self.arrays, self.key, self.cost_s = ticket, arrays, key, cost_s
        self.users, self.candidates, self.rows = users, candidates, users * candidates
        self.state = QUEUED
        self.solo = False
        self.avoid: Any = None
        self.outputs: dict[str, np.ndarray] = {}


_Heap = list[tuple[float, int, Part]]


class TierQueue:
    """Parts of one tier."""

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

    def push(self, part: Part) -> None:
        """Queue a part."""
        ticket = part.ticket
        entry = (ticket.order, next(self._made), part)
        heapq.heappush(self._all, entry)
        heap = self._by_key.get(part.key)
        if heap is None:
            heap = self._by_key[part.key] = []
        heapq.heappush(heap, entry)
        self.count += 1
        self.queued_s += part.cost_s
        self.by_priority[ticket.priority] = self.by_priority.get(ticket.priority, 0.0) + part.cost_s

    def left(self, part: Part) -> None:
        """A queued part has been taken or taken back: the counts, at once."""
        self.count -= 1
        priority = part.ticket.priority
        if self.count:
            self.queued_s = max(self.queued_s - part.cost_s, 0.0)
            self.by_priority[priority] = max(self.by_priority[priority] - part.cost_s, 0.0)
        else:
            # Nothing is left of rounding either, nor of the entries of parts that are gone.
            self.queued_s = 0.0
            self.by_priority.clear()
            self._all.clear()
            self._by_key.clear()

    def head(self) -> Part | None:
        """The next part."""
        return _head(self._all)

    def head_of(self, key: Any) -> Part | None:
        """The next part that can share a call with others of ``key``."""
        heap = self._by_key.get(key)
        if heap is None:
            return None
        part = _head(heap)
        if part is None:
            del self._by_key[key]
        return part

    def drop(self, part: Part) -> None:
        """Forget entries at the heads that are gone (``part`` has just been taken)."""
        self.head_of(part.key)
        _head(self._all)

    def ahead_s(self, priority: int) -> float:
        """Engine seconds queued that go before a new request of ``priority``."""
        if len(self.by_priority) <= 1:
            return self.queued_s
        return sum([cost for level, cost in self.by_priority.items() if level <= priority])


def _head(heap: _Heap) -> Part | None:
    while heap:
        order, _, part = heap[0]
        if part.state == QUEUED and part.ticket.order == order:
            return part
        heapq.heappop(heap)
    return None


class Queues:
    """The express lane and the tiers of one model version."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.tiers = {name: TierQueue(name, weight) for name, weight in weights.items()}
        self.express = TierQueue(EXPRESS, 1.0)
        self.count = 0
        self.bytes = 0
        self.by_priority: dict[int, int] = {}
        # Nothing starts before so many wait; once.
        self.hold = 0
        self._virtual = 0.0

    def queued_s(self) -> float:
        """Engine seconds of the parts that wait, the express lane apart."""
        return sum([queue.queued_s for queue in self.tiers.values()])

    def of(self, ticket: Ticket) -> TierQueue:
        """The queue a ticket's parts stand in."""
        return self.express if ticket.lane == EXPRESS else self.tiers[ticket.tier]

    def enter(self, ticket: Ticket) -> None:
        """A ticket begins to wait."""
        self.bytes += ticket.bytes
        counts = self.by_priority
        counts[ticket.priority] = counts.get(ticket.priority, 0) + 1
        for chunk in ticket.parts:
            for part in chunk:
                self.push(part)

    def leave(self, ticket: Ticket) -> None:
        """A ticket waits no more: a part of it starts, or it is not wanted."""
        self.bytes -= ticket.bytes
        self.by_priority[ticket.priority] -= 1

    def pass_by(self, part: Part) -> None:
        """What :meth:`push` and :meth:`take` come to where nothing is queued."""
        queue = self.of(part.ticket)
        self._virtual = max(self._virtual, queue.passed)
        queue.passed = self._virtual + part.cost_s / queue.weight
        part.state = RUNNING

    def push(self, part: Part) -> None:
        """Queue a part; a tier that was away starts level with the others, not ahead."""
        queue = self.of(part.ticket)
        if not queue.count:
            queue.passed = max(queue.passed, self._virtual)
        queue.push(part)
        self.count += 1

    def take(self, part: Part) -> None:
        """The part goes into a batch."""
        queue = self.of(part.ticket)
        self._virtual = max(self._virtual, queue.passed)
        queue.passed += part.cost_s / queue.weight
        part.state = RUNNING
        queue.left(part)
        queue.drop(part)
        self.count -= 1

    def remove(self, part: Part) -> None:
        """The part is not wanted any more."""
        part.state = DONE
        self.of(part.ticket).left(part)
        self.count -= 1

    def tier_next(self, aged_before: float) -> TierQueue | None:
        """The tier whose turn it is: one whose head arrived before ``aged_before``, else the one
        that is furthest behind its share."""
        best, aged = None, None
        oldest = aged_before
        for queue in self.tiers.values():
            if not queue.count:
                continue
            head = queue.head()
            if head is not None and head.ticket.arrival < oldest:
                aged, oldest = queue, head.ticket.arrival
            if best is None or queue.passed < best.passed:
                best = queue
        return aged or best

    def heads(self, key: Any) -> Iterator[Part]:
        """Parts of ``key`` in the order of the tiers' turns; take each before asking for more."""
        while True:
            best: tuple[float, Part] | None = None
            for queue in self.tiers.values():
                part = queue.head_of(key) if queue.count else None
                behind = best is None or queue.passed < best[0]
                if part is not None and not part.solo and behind:
                    best = (queue.passed, part)
            if best is None:
                return
            yield best[1]

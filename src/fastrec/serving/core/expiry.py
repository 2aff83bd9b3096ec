"""Requests that wait past their deadline leave the queue when it passes, not when they are met."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.queues import PendingRequest


class Expiries:
    """Deadlines of what is queued, and one timer for the earliest.

    Args:
        timed_out: called with each request that is still queued at its deadline.
    """

    def __init__(self, clock: Clock, timed_out: Callable[[PendingRequest], object]) -> None:
        self._clock, self._timed_out = clock, timed_out
        self._heap: list[tuple[float, int, PendingRequest]] = []
        self._made = itertools.count()
        self._timer: tuple[float, Timer] | None = None

    def add(self, pending: PendingRequest) -> None:
        """A request that has begun to wait, or waits again."""
        heapq.heappush(self._heap, (pending.deadline, next(self._made), pending))
        self._arm()

    def _arm(self) -> None:
        heap = self._heap
        while heap and not heap[0][2].waits:
            heapq.heappop(heap)
        if not heap:
            return
        when = heap[0][0]
        if self._timer is not None:
            if self._timer[0] <= when:
                return
            self._timer[1].cancel()
        self._timer = (when, self._clock.call_at(when, self._expire))

    def _expire(self) -> None:
        self._timer = None
        now, heap = self._clock.now(), self._heap
        while heap and heap[0][0] <= now:
            _, _, pending = heapq.heappop(heap)
            if pending.waits:
                self._timed_out(pending)
        self._arm()

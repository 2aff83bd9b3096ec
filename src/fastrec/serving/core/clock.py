"""Time as the scheduler sees it: the event loop's, or a virtual one for tests and simulations."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Take it back; harmless after it has run."""


class Clock(Protocol):
    """Seconds that only go forward, and calls to come. Everything runs in one thread."""

    def now(self) -> float:
        """Seconds since an arbitrary moment."""

    def call_at(self, when: float, call: Callable[[], Any]) -> Timer:
        """Run ``call`` when ``now()`` reaches ``when`` (at once where that has passed)."""


class LoopClock:
    """``time.monotonic``, and an asyncio loop's timers.

    Not the loop's own time: uvloop's stands still while callbacks run, and counts milliseconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self.now: Callable[[], float] = time.monotonic

    def call_at(self, when: float, call: Callable[[], Any]) -> Timer:
        return self._loop.call_later(max(when - time.monotonic(), 0.0), call)


class _Call:
    __slots__ = ("call",)

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call: Callable[[], Any] | None = call

    def cancel(self) -> None:
        self.call = None


class VirtualClock:
    """Time that passes only in :meth:`run`; calls of one moment run in the order they were made."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._calls: list[tuple[float, int, _Call]] = []
        self._made = 0

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, call: Callable[[], Any]) -> Timer:
        entry = _Call(call)
        self._made += 1
        heapq.heappush(self._calls, (max(when, self._now), self._made, entry))
        return entry

    def run(self, until: float = float("inf"), *, most: int | None = None) -> int:
        """Run what is due up to ``until``, and leave the clock there (at the last call's time where
        ``until`` is infinite). Returns how many calls ran; stops after ``most``."""
        ran = 0
        while self._calls and self._calls[0][0] <= until and (most is None or ran < most):
            when, _, entry = heapq.heappop(self._calls)
            self._now = when
            if entry.call is not None:
                entry.call()
                ran += 1
        if until != float("inf") and (most is None or ran < most):
            self._now = max(self._now, until)
        return ran

"""Open-loop load generator: sends a schedule's requests on time and records the answers.

Everything runs in the clock's thread. Requests go to a :class:`Target`: a server, or in tests a
scheduler on a virtual clock.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from fastrec.serving.core.clock import Clock
from fastrec.serving.load.plan import LoadPlan, Schedule, draw

OK, UNANSWERED = "ok", "unanswered"
# Kinds of refusal that another try may get past.
RETRIED = frozenset(
    (
        "quota",
        "overload",
        "queue_full",
        "deadline_infeasible",
        "expired",
        "not_ready",
        "unavailable",
    )
)
# Requests sent before answers are looked at again, where the generator is behind.
_AT_ONCE = 32


class PlannedRequest(NamedTuple):
    """A request to be sent. ``size``, ``variant``: which of the prepared ones."""

    number: int
    tier: str
    tenant: str
    priority: int
    timeout_s: float | None
    size: int
    variant: int


class TryResult(NamedTuple):
    """``outcome``: "ok", or why not; ``retry_after_s``: when the server says to come back, negative
    where it says not to; ``text``: the refusal's own words."""

    outcome: str
    retry_after_s: float | None = None
    text: str = ""


class Target(Protocol):
    """The system under load."""

    def send(self, shot: PlannedRequest, done: Callable[[TryResult], None]) -> None:
        """Send; ``done`` is called once, later, in the clock's thread."""


class RequestLog:
    """Outcome of each request of a schedule, one array element each.

    Attributes:
        sent_s: first try, seconds from the start; NaN where it was never sent.
        done_s: last answer; NaN where there was none.
        outcome: indices into ``outcomes``.
        tries: as many as were sent.
        texts: outcome -> the words of the first refusal of that kind.
        cpu_s: processor time of the process that sent.
    """

    def __init__(self, count: int) -> None:
        self.sent_s = np.full(count, np.nan)
        self.done_s = np.full(count, np.nan)
        self.outcome = np.zeros(count, np.int16)
        self.tries = np.zeros(count, np.int16)
        self.outcomes = [UNANSWERED, OK]
        self.texts: dict[str, str] = {}
        self.cpu_s = 0.0
        self._index = {name: i for i, name in enumerate(self.outcomes)}

    def end(self, number: int, outcome: str, at_s: float, text: str = "") -> None:
        """The last answer to a request."""
        if text:
            self.texts.setdefault(outcome, text)
        index = self._index.get(outcome)
        if index is None:
            index = self._index[outcome] = len(self.outcomes)
            self.outcomes.append(outcome)
        self.outcome[number] = index
        self.done_s[number] = at_s


class Generator:
    """One run of a plan.

    Args:
        plan: what to send.
        target: what to send it to.
        clock: whose time it is.
        finished: called once every request has its last answer.
    """

    def __init__(
        self,
        plan: LoadPlan,
        target: Target,
        clock: Clock,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.target, self.clock = plan, target, clock
        self.schedule: Schedule = draw(plan)
        self.log = RequestLog(len(self.schedule))
        self._finished = finished
        self._random = random.Random(plan.seed)
        self._next, self._open = 0, 0
        self._closed = False
        self._start = 0.0
        # Plain lists: an element of an array costs several times as much to read.
        s = self.schedule
        self._at: list[float] = s.at_s.tolist()
        self._what = list(
            zip(s.mix.tolist(), s.tenant.tolist(), s.size.tolist(), s.variant.tolist(), strict=True)
        )
        self._mix = [
            (m.tier, m.priority, None if m.timeout_ms is None else m.timeout_ms / 1e3)
            for m in plan.mix
        ]

    def start(self) -> None:
        """Begin; the first request is due ``schedule.at_s[0]`` seconds from now."""
        self._start = self.clock.now()
        if not self._at:
            self.clock.call_at(self._start, self._finished)
            return
        # On the clock: a time that is added and taken off again is not what it was.
        self._at = [self._start + at for at in self._at]
        self.clock.call_at(self._at[0], self._due)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock.now() - self._start

    def close(self) -> None:
        """Send nothing more; answers still to come are not noted."""
        self._closed = True

    def _due(self) -> None:
        if self._closed:
            return
        at, last = self._at, min(self._next + _AT_ONCE, len(self._at))
        now = self.clock.now()
        while self._next < last and at[self._next] <= now:
            number = self._next
            self._next += 1
            self._open += 1
            self.log.sent_s[number] = now - self._start
            self._send(number, 1)
        if self._next < len(at):
            # Where it is behind, answers get their turn first.
            self.clock.call_at(at[self._next], self._due)

    def _send(self, number: int, tries: int) -> None:
        if self._closed:
            return
        mix, tenant, size, variant = self._what[number]
        tier, priority, timeout_s = self._mix[mix]
        self.log.tries[number] = tries
        named = f"{tier or 'tenant'}-{tenant}" if tenant >= 0 else ""
        shot = PlannedRequest(number, tier, named, priority, timeout_s, size, variant)
        self.target.send(shot, lambda answer: self._answered(number, tries, answer))

    def _answered(self, number: int, tries: int, answer: TryResult) -> None:
        if self._closed:
            return
        now = self.clock.now()
        retry = self.plan.retry
        if tries < retry.tries and answer.outcome in RETRIED:
            told = answer.retry_after_s if retry.obey else None
            if told is None or told >= 0:
                most = retry.backoff_ms / 1e3 * retry.factor ** (tries - 1)
                wait = (told or 0.0) + self._random.uniform(0, most)
                self.clock.call_at(now + wait, lambda: self._send(number, tries + 1))
                return
        self.log.end(number, answer.outcome, now - self._start, answer.text)
        self._open -= 1
        if not self._open and self._next == len(self._at):
            self._finished()


async def run(
    plan: LoadPlan,
    target: Target,
    clock: Clock,
    begun: Callable[[Generator], None] | None = None,
) -> Generator:
    """A plan against the real clock of the running loop; returns when every request has its last
    answer, or the plan's patience is over.

    Args:
        begun: called once it has started: to arrange what else is to happen.
    """
    over = asyncio.Event()
    generator = Generator(plan, target, clock, over.set)
    # A full collection in a process with many modules stops it for a tenth of a second.
    gc.collect()
    gc.freeze()
    before = time.process_time()
    generator.start()
    if begun is not None:
        begun(generator)
    try:
        await asyncio.wait_for(over.wait(), plan.seconds + plan.patience_s)
    except asyncio.TimeoutError:
        pass
    finally:
        generator.close()
        generator.log.cpu_s = time.process_time() - before
        gc.unfreeze()
    return generator

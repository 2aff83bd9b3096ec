"""The scheduler of one model version: no threads, no sockets, no waiting. Everything that happens
is a call of one of its methods, in one thread, at a moment of the clock.

    submit -> admitted or Rejected -> queued -> batch -> engine.run -> done(ticket)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fastrec.serving.core.admission import Gcra, quotas_of
from fastrec.serving.core.batcher import Batch, Batcher
from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.engines import EngineDied, EngineHandle, Ran
from fastrec.serving.core.events import BatchDone, Event, LimitChanged, RequestDone, Screened
from fastrec.serving.core.expiry import Expiries
from fastrec.serving.core.gate import Gate
from fastrec.serving.core.lanes import (
    DONE,
    EXPRESS,
    QUEUED,
    RUNNING,
    STANDARD,
    Part,
    Queues,
    Ticket,
)
from fastrec.serving.core.request import TIMED_OUT, Kind, Load, Rejected, Request
from fastrec.serving.core.router import Router, Slot
from fastrec.serving.core.signature import Signature
from fastrec.serving.core.terms import TermsTable

# Requests timed out under the DELAY policy go so far back: behind all others.
_DELAY_S = 1e6
# After a refusal requests are looked at before they are decoded for so long.
_SHEDDING_S = 0.25


def _ignore(ticket: Ticket) -> None:
    """For tickets that nobody waits for."""


class Scheduler:
    """Lanes, batches and routing for the engines of one model version, behind a gate.

    Args:
        name, version: of the model.
        signature: how its requests are cut and joined.
        quotas: tier -> its tenants' buckets, shared by all models.
        emit: told every event.
        guard: the system guard's factor on the limit.
        on_lost: told of engines that died, hang, or were taken out.
    """

    def __init__(
        self,
        name: str,
        version: str,
        config: ServingConfig,
        clock: Clock,
        signature: Signature,
        *,
        quotas: dict[str, Gcra] | None = None,
        emit: Callable[[Event], None] = lambda event: None,
        guard: Callable[[], float] = lambda: 1.0,
        on_lost: Callable[[Slot, str], None] = lambda slot, reason: None,
    ) -> None:
        self.name, self.version = name, version
        self.config, self.clock, self.signature = config, clock, signature
        self._emit, self._on_lost = emit, on_lost
        goals = [config.latency_s(tier) for tier in config.tiers]
        goal_s = min(goals)
        cap_ms = config.batching.max_batch_ms
        self.batch_s = goal_s / 4 if cap_ms is None else cap_ms / 1e3
        step, age = config.lanes.priority_step_ms, config.lanes.age_ms
        self._terms = TermsTable(config, goal_s if step is None else step / 1e3)
        self._age_s = 2 * max(goals) if age is None else age / 1e3
        self._uses_express = bool(config.lanes.express_priorities) or any(
            t.express for t in config.tiers.values()
        )
        self.queues = Queues({tier: t.weight for tier, t in config.tiers.items()})
        self.router = Router(config.pool, clock, signature.deep)
        self.batcher = Batcher(config.batching, signature, self.batch_s)
        self.gate = Gate(
            name,
            config,
            self.queues,
            self.router,
            quotas=quotas_of(config) if quotas is None else quotas,
            guard=guard,
            goal_s=goal_s,
            batch_s=self.batch_s,
        )
        self.open: dict[int, Ticket] = {}
        self.queues.hold = config.lanes.hold_until
        self._expiries = Expiries(clock, self._timed_out)
        self._delay_timer: Timer | None = None
        self._dispatching = False
        self.counts: dict[str, dict[str, int]] = {tier: {} for tier in config.tiers}
        self.served_s: dict[str, float] = dict.fromkeys(config.tiers, 0.0)

    # --- in

    def submit(self, ticket: Ticket, arrays: tuple[np.ndarray, ...]) -> None:
        """Admit and queue a ticket, which starts at once where a slot is free.

        Raises:
            Rejected: QUOTA, OVERLOAD, QUEUE_FULL, DEADLINE_INFEASIBLE, EXPIRED, NOT_READY or
                INVALID; nothing was charged or queued.
        """
        now = self.clock.now()
        self._admit(ticket, self.signature.size(arrays), now)
        self.gate.enter(ticket, now)
        self.open[id(ticket)] = ticket
        self.batcher.split(ticket, arrays, self.router.model)
        if self._start_at_once(ticket, now):
            return
        self.queues.enter(ticket)
        self.dispatch()
        if ticket.state == QUEUED:
            self._expiries.add(ticket)

    def shedding(self) -> bool:
        """Whether no engine is idle, and a request was refused for want of room just now."""
        return not self.router.idle() and self.clock.now() < self.gate.shut_at + _SHEDDING_S

    def turn_away(self, request: Request, size: tuple[int, int]) -> None:
        """Refuse a request as :meth:`submit` would, before its inputs are there; what is let pass
        here is submitted all the same.

        Args:
            size: users and candidates.

        Raises:
            Rejected: see :meth:`submit`.
        """
        self._admit(Ticket(request, (), _ignore), size, self.clock.now(), early=True)

    def _admit(
        self, ticket: Ticket, size: tuple[int, int], now: float, *, early: bool = False
    ) -> None:
        try:
            self._describe(ticket, size, now, early)
            self.gate.admit(ticket, now)
        except Rejected as refusal:
            ticket.state, ticket.error = DONE, refusal
            self._tell(ticket, now, refusal.kind.value)
            raise

    def _describe(self, ticket: Ticket, size: tuple[int, int], now: float, early: bool) -> None:
        """Fill in what follows from the request and the configuration."""
        request = ticket.request
        ticket.arrival = now
        terms = self._terms.of(request.tier, request.priority)
        if terms is None:
            ticket.tier, ticket.priority, ticket.rows = self.config.default_tier, 0, 0
            wrong = f"tier: expected one of {sorted(self.config.tiers)}, got {request.tier!r}"
            raise Rejected(Kind.INVALID, wrong)
        ticket.terms, ticket.tier, ticket.priority = terms, terms.tier, terms.priority
        ticket.users, ticket.candidates = users, candidates = size
        ticket.rows = users * self.signature.deep(candidates)
        ticket.cost_s = self.router.model.predict(users, ticket.rows)
        deadline = request.deadline if terms.own_deadline else None
        ticket.deadline = now + terms.timeout_s if deadline is None else deadline
        ticket.order = min(ticket.deadline, now + self._age_s) + terms.later_s
        if (
            terms.express
            and ticket.cost_s <= self.batch_s
            and self.gate.takes_express(ticket.cost_s, now, charge=not early)
        ):
            ticket.lane = EXPRESS

    def _start_at_once(self, ticket: Ticket, now: float) -> bool:
        """Start a ticket that nothing is ahead of, past the queue: most are such while there is
        no overload. What is not plain goes through the queue, which decides the same."""
        if (
            self.queues.count
            or ticket.pieces != 1
            or self.queues.hold
            or self._dispatching
            or self.config.batching.max_delay_ms
        ):
            return False
        part = ticket.parts[0][0]
        if self._is_late(part, now):
            return False
        slot = self._slot_for(part, now)
        if slot is None:
            return False
        self.queues.pass_by(part)
        ticket.state = RUNNING
        self._start([part], ticket.lane, slot, now)
        return True

    def load(self, users: int = 0, rows: int = 0) -> Load:
        """What a caller that has other hosts to choose from should know before it sends a request
        of so many users and rows (0 = usual ones)."""
        if not self.router.slots:
            return Load(False, len(self.open))
        model = self.router.model
        users = users or 1
        own_s = model.predict(users, rows or users * model.usual_rows)
        latency_s = self.gate.backlog_s(self.clock.now()) + own_s
        each_s = own_s * self.gate.gain / len(self.router.slots)
        return Load(True, len(self.open), latency_s, each_s)

    # --- out, before the end

    def cancel(self, ticket: Ticket) -> None:
        """The caller does not want it any more: it leaves the queue at once."""
        if ticket.state != DONE:
            self._finish(ticket, Rejected(Kind.CANCELLED, "the request was cancelled"))

    def fail_all(self, kind: Kind, why: str) -> None:
        """Answer everything open with a refusal."""
        for ticket in list(self.open.values()):
            self._finish(ticket, Rejected(kind, why))

    def _timed_out(self, ticket: Ticket) -> bool:
        """Whether it left the queue (under DELAY it only goes behind all others)."""
        if ticket.terms.rejects:
            self._finish(ticket, Rejected(Kind.EXPIRED, TIMED_OUT))
            return True
        if not ticket.delayed:
            ticket.delayed = True
            parts = [p for chunk in ticket.parts for p in chunk if p.state == QUEUED]
            for part in parts:
                self.queues.remove(part)
            ticket.order += _DELAY_S
            for part in parts:
                part.state = QUEUED
                self.queues.push(part)
        return False

    # --- engines

    def add_engine(self, handle: EngineHandle, slot: Slot | None = None) -> Slot:
        """A warm engine takes requests from now on."""
        slot = self.router.add(handle) if slot is None else self.router.put(slot)
        self.dispatch()
        return slot

    def remove_engine(self, slot: Slot) -> None:
        """Give it no more; what it runs is finished."""
        self.router.remove(slot)

    def found_dead(self, slot: Slot) -> None:
        """An engine died; one that had a call says so itself."""
        if slot.batch is None and slot in self.router.slots:
            self.router.remove(slot)
            self._on_lost(slot, "died")

    # --- batches

    def dispatch(self) -> None:
        """Start what can start: called whenever work comes or an engine is free."""
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self.queues.count and self._dispatch_one():
                pass
        finally:
            self._dispatching = False

    def _dispatch_one(self) -> bool:
        now, queues = self.clock.now(), self.queues
        if queues.hold:
            if queues.count < queues.hold:
                return False
            queues.hold = 0
        if not self.router.idle():
            return False
        if queues.express.count:
            part = queues.express.head()
            if part is None or self._too_late(part, now):
                return True
            slot = self._slot_for(part, now)
            assert slot is not None
            queues.take(part)
            self._start([part], EXPRESS, slot, now)
            return True
        if not self._unreserved():
            return False
        tier = queues.tier_next(now - self._age_s)
        seed = tier.head() if tier is not None else None
        if seed is None or self._too_late(seed, now):
            return seed is not None
        slot = self._slot_for(seed, now)
        if slot is None:
            return False
        wait = self.batcher.wait_until(seed, queues, slot, now)
        if wait > now:
            self._wake_at(wait)
            return False
        engines = len(self.router.slots)
        parts = self.batcher.fill(
            seed, queues, slot.model, now, engines, lambda p: self._too_late(p, now)
        )
        self._start(parts, STANDARD, slot, now)
        return True

    def _slot_for(self, part: Part, now: float) -> Slot | None:
        """The idle engine for the call that ``part`` begins; None = it has to wait."""
        router = self.router
        idle = router.idle()
        if part.ticket.lane == EXPRESS:
            return router.fastest(idle, part.avoid) if idle else None
        if not self._unreserved():
            return None
        return router.pick(idle, part, self.queues, self.gate.gain, now)

    def _unreserved(self) -> bool:
        """Whether an engine is idle that is not kept for express requests."""
        slots, idle = len(self.router.slots), len(self.router.idle())
        reserved = self.config.lanes.reserved_slots
        if reserved is None:
            reserved = 1 if self._uses_express else 0
        return idle > min(reserved, max(slots - 1, 0))

    def _wake_at(self, when: float) -> None:
        if self._delay_timer is not None:
            self._delay_timer.cancel()
        self._delay_timer = self.clock.call_at(when, self.dispatch)

    def _is_late(self, part: Part, now: float) -> bool:
        """Whether the part cannot be done in time any more."""
        ticket, admission = part.ticket, self.config.admission
        return (
            now + part.cost_s > ticket.deadline
            and admission.enabled
            and admission.check_deadlines
            and not ticket.delayed
        )

    def _too_late(self, part: Part, now: float) -> bool:
        """Whether the part is late and has therefore left the queue."""
        return self._is_late(part, now) and self._timed_out(part.ticket)

    def _start(self, parts: list[Part], lane: str, slot: Slot, now: float) -> None:
        rows = self.signature.deep(parts[0].key[0])
        batch = Batch(parts, lane, rows, slot.model, now)
        name, rows = slot.handle.name, batch.rows
        for part in parts:
            ticket = part.ticket
            if ticket.state == QUEUED:
                ticket.state = RUNNING
                self.queues.leave(ticket)
            ticket.started, ticket.batch_rows, ticket.engine = now, rows, name
        arrays = parts[0].arrays
        if len(parts) > 1 or parts[0].candidates != batch.padded:
            arrays = self.signature.join([p.arrays for p in parts], batch.padded)
        self.router.start(slot, batch, self._stalled)
        slot.handle.run(arrays, partial(self._ran, slot, batch))

    def _ran(self, slot: Slot, batch: Batch, ran: Ran) -> None:
        """An engine has answered."""
        now = self.clock.now()
        self.router.end(slot, batch, now)
        if batch.given_up:
            # It hung, and its requests ran elsewhere; the engine is well again.
            return
        error, seconds = ran.error, ran.seconds
        self._emit(
            BatchDone(
                now,
                self.name,
                self.version,
                slot.handle.name,
                batch.lane,
                len(batch.parts),
                batch.rows,
                seconds,
                batch.predicted_s,
                "" if error is None else f"{type(error).__name__}: {error}",
            )
        )
        if error is None:
            if ran.recall is not None:
                self._emit(Screened(now, self.name, self.version, ran.recall))
            self._learn(slot, batch, seconds, now)
            self._answered(batch, ran)
        elif isinstance(error, EngineDied):
            self.router.remove(slot)
            self._again(batch.parts, slot, error)
            self._on_lost(slot, "died")
        else:
            if self.router.failed(slot):
                self._on_lost(slot, "failing")
            self._again(batch.parts, slot, error)
        if self.queues.count:
            self.dispatch()

    def _answered(self, batch: Batch, ran: Ran) -> None:
        """Give each part of a call its outputs."""
        start = 0
        for part in batch.parts:
            if part.state == RUNNING:
                part.outputs = (
                    self.signature.part(ran.outputs, start, part.users, part.candidates)
                    if len(batch.parts) > 1 or part.candidates != batch.padded
                    else ran.outputs
                )
                self._part_done(part, ran.seconds)
            start += part.users

    def _learn(self, slot: Slot, batch: Batch, seconds: float, now: float) -> None:
        usual_s = slot.reference.predict(batch.users, batch.rows)
        if self.router.observe(slot, batch, seconds, now):
            self._on_lost(slot, "slow")
        cost_s = 0.0 if batch.lane == EXPRESS else sum([p.cost_s for p in batch.parts])
        gate = self.gate
        if gate.learn(seconds, usual_s, cost_s):
            self._emit(LimitChanged(now, gate.limit_s, gate.guard(), "gradient"))

    def _stalled(self, slot: Slot, batch: Batch) -> None:
        """A call takes far too long: run its requests elsewhere, take the engine out."""
        batch.given_up = True
        self.router.remove(slot)
        self._again(batch.parts, slot, EngineDied(f"{slot.handle.name} does not answer"))
        self._on_lost(slot, "stalled")
        self.dispatch()

    def _again(self, parts: list[Part], slot: Slot, error: Exception) -> None:
        """Parts whose engine failed: once more, on another one where there is one."""
        for part in parts:
            ticket = part.ticket
            if part.state != RUNNING:
                continue
            died = isinstance(error, EngineDied)
            # A call of several parts failed: one of them may be the cause, the others are well.
            culprit_unknown = len(parts) > 1
            retry = died or culprit_unknown or len(self.router.slots) > 1
            if not retry or ticket.tries >= self.config.pool.max_tries:
                kind = Kind.NOT_READY if died else Kind.INTERNAL
                self._finish(ticket, Rejected(kind, f"{type(error).__name__}: {error}"))
                continue
            ticket.tries += 1
            part.solo = part.solo or (culprit_unknown and not died)
            part.avoid = slot
            part.state = QUEUED
            self.queues.push(part)

    def _part_done(self, part: Part, seconds: float) -> None:
        part.state = DONE
        ticket = part.ticket
        ticket.compute_s = max(ticket.compute_s, seconds)
        ticket.open_parts -= 1
        if ticket.open_parts == 0:
            ticket.outputs = (
                part.outputs
                if ticket.pieces == 1
                else self.signature.whole([[p.outputs for p in chunk] for chunk in ticket.parts])
            )
            self._finish(ticket, None)

    def _finish(self, ticket: Ticket, error: Rejected | None) -> None:
        """The one place where a ticket ends."""
        now = self.clock.now()
        if error is not None:
            if ticket.state == QUEUED:
                self.queues.leave(ticket)
            for chunk in ticket.parts:
                for part in chunk:
                    if part.state == QUEUED:
                        self.queues.remove(part)
                    part.state = DONE
        ticket.state, ticket.error = DONE, error
        del self.open[id(ticket)]
        self.gate.leave(ticket, last=not self.open)
        if error is None:
            self.served_s[ticket.tier] += ticket.cost_s
            if ticket.expected:
                self.gate.slack[ticket.tier].add(now - ticket.expected)
        self._tell(ticket, now, "ok" if error is None else error.kind.value)
        ticket.done(ticket)
        ticket.parts = []

    def _tell(self, ticket: Ticket, now: float, outcome: str) -> None:
        counts = self.counts[ticket.tier]
        counts[outcome] = counts.get(outcome, 0) + 1
        queue_s = (ticket.started or now) - ticket.arrival
        self._emit(
            RequestDone(
                now,
                self.name,
                self.version,
                ticket.tier,
                ticket.lane,
                ticket.priority,
                outcome,
                ticket.rows,
                queue_s,
                ticket.compute_s,
                now - ticket.arrival,
                ticket.request.id,
            )
        )

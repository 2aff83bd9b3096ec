"""The scheduler of one model version: no threads, no sockets, no waiting. Everything that happens
is a call of one of its methods, in one thread, at a moment of the clock.

    submit -> admitted or Rejected -> queued -> batch -> engine.run -> done(ticket)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastrec.serving.core.admission import Gcra, Limit, quotas_of
from fastrec.serving.core.batcher import Batch, Batcher
from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.config import QueuePolicy, ServingConfig
from fastrec.serving.core.engines import EngineDied, EngineHandle, Ran
from fastrec.serving.core.events import BatchDone, Event, LimitChanged, RequestDone
from fastrec.serving.core.expiry import Expiries
from fastrec.serving.core.lanes import DONE, EXPRESS, QUEUED, RUNNING, Part, Queues, Ticket
from fastrec.serving.core.latency import Quantile
from fastrec.serving.core.request import QUEUE_FULL, TIMED_OUT, Kind, Rejected
from fastrec.serving.core.router import Router, Slot
from fastrec.serving.core.signature import Signature

# Requests timed out under the DELAY policy go so far back: behind all others.
_DELAY_S = 1e6


class Scheduler:
    """Admission, lanes, batches and routing for the engines of one model version.

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
        self.quotas = quotas_of(config) if quotas is None else quotas
        self._emit, self._guard, self._on_lost = emit, guard, on_lost
        goals = [config.latency_s(tier) for tier in config.tiers]
        self.goal_s = min(goals)
        cap_ms = config.batching.max_batch_ms
        self.batch_s = self.goal_s / 4 if cap_ms is None else cap_ms / 1e3
        lanes = config.lanes
        step, age = lanes.priority_step_ms, lanes.age_ms
        self._step_s = self.goal_s if step is None else step / 1e3
        self._age_s = 2 * max(goals) if age is None else age / 1e3
        self.queues = Queues({tier: t.weight for tier, t in config.tiers.items()})
        self._weights = sum(t.weight for t in config.tiers.values())
        self.limit = Limit(config.admission, self.goal_s, self.batch_s)
        self.router = Router(config.pool, clock)
        self.batcher = Batcher(config.batching, signature, self.batch_s)
        # How much later than expected answers come: 995 of 1000 come no later than this.
        self.slack = Quantile(0.995, self.goal_s / 200)
        self.gain = 1.0
        self.in_flight_s = 0.0
        self.express_in_flight_s = 0.0
        self.express_bucket: Gcra | None = None
        self._express_slots = 0
        self.open: dict[int, Ticket] = {}
        self._hold = lanes.hold_until
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
        try:
            self._describe(ticket, arrays, now)
            if self.config.admission.enabled:
                self._admit(ticket, now)
            elif not self.router.slots:
                raise Rejected(Kind.NOT_READY, f"model '{self.name}' has no engine that can run")
        except Rejected as refusal:
            ticket.state, ticket.error = DONE, refusal
            self._tell(ticket, now, str(refusal.kind))
            raise
        quota = self.quotas.get(ticket.tier)
        if quota is not None:
            quota.spend(ticket.request.tenant, ticket.cost_s * 1e6, now)
        self.in_flight_s += ticket.cost_s
        self.queues.tiers[ticket.tier].in_flight_s += ticket.cost_s
        self.open[id(ticket)] = ticket
        self.queues.bytes += ticket.bytes
        counts = self.queues.by_priority
        counts[ticket.priority] = counts.get(ticket.priority, 0) + 1
        self.batcher.split(ticket, arrays, self.router.model)
        for chunk in ticket.parts:
            for part in chunk:
                self.queues.push(part)
        self.dispatch()
        if ticket.state == QUEUED:
            self._expiries.add(ticket)

    def _describe(self, ticket: Ticket, arrays: tuple[np.ndarray, ...], now: float) -> None:
        """Fill in what follows from the request and the configuration."""
        request, lanes = ticket.request, self.config.lanes
        tier = request.tier or self.config.default_tier
        if tier not in self.config.tiers:
            wrong = f"tier: expected one of {sorted(self.config.tiers)}, got {tier!r}"
            ticket.tier, ticket.priority, ticket.rows = self.config.default_tier, 0, 0
            ticket.arrival = now
            raise Rejected(Kind.INVALID, wrong)
        ticket.tier, ticket.arrival = tier, now
        priority = request.priority or lanes.default_priority
        ticket.priority = min(max(priority, 1), lanes.priority_levels)
        ticket.users, ticket.candidates = self.signature.size(arrays)
        ticket.rows = ticket.users * ticket.candidates
        ticket.cost_s = self.router.model.predict(ticket.users, ticket.rows)
        policy = self._policy(ticket.priority)
        deadline = request.deadline if policy.allow_timeout_override else None
        if deadline is None:
            timeout = policy.default_timeout_us / 1e6 or self.config.latency_s(tier)
            deadline = now + timeout
        ticket.deadline = deadline
        level = (ticket.priority - lanes.default_priority) * self._step_s
        ticket.order = min(deadline + level, now + self._age_s + level)
        fast = ticket.priority in lanes.express_priorities or (
            self.config.tiers[tier].express and not request.priority
        )
        if fast and ticket.cost_s <= self.batch_s:
            bucket = self._express()
            if bucket is None or bucket.wait_s("", ticket.cost_s, now) == 0:
                ticket.lane = EXPRESS
                if bucket is not None:
                    bucket.spend("", ticket.cost_s, now)

    def _express(self) -> Gcra | None:
        """What the express lane may use of the slots there are; None = all of it."""
        share, slots = self.config.lanes.express_share, len(self.router.slots)
        if share >= 1:
            return None
        if slots != self._express_slots or self.express_bucket is None:
            rate = max(share * max(slots, 1), 1e-9)
            self.express_bucket = Gcra(rate, max(rate * self.goal_s * 4, self.batch_s))
            self._express_slots = slots
        return self.express_bucket

    def _policy(self, priority: int) -> QueuePolicy:
        lanes = self.config.lanes
        return lanes.policies.get(priority, lanes.default_policy)

    def _admit(self, ticket: Ticket, now: float) -> None:
        """Raise where the ticket is refused; charge nothing."""
        lanes, queues = self.config.lanes, self.queues
        slots = len(self.router.slots)
        if not slots:
            raise Rejected(Kind.NOT_READY, f"model '{self.name}' has no engine that can run", 1.0)
        quota = self.quotas.get(ticket.tier)
        if quota is not None:
            wait = quota.wait_s(ticket.request.tenant, ticket.cost_s * 1e6, now)
            if wait > 0:
                raise Rejected(Kind.QUOTA, f"the quota of tier '{ticket.tier}' is used up", wait)
        if ticket.deadline <= now:
            raise Rejected(Kind.EXPIRED, TIMED_OUT)
        most = self._policy(ticket.priority).max_queue_size
        waiting = queues.by_priority.get(ticket.priority, 0)
        if (
            most and waiting >= most and not self._starts_now()
        ) or queues.count >= lanes.max_queued:
            raise Rejected(Kind.QUEUE_FULL, QUEUE_FULL, self._drained_s())
        if queues.bytes + ticket.bytes > lanes.max_queued_bytes and queues.bytes:
            raise Rejected(Kind.QUEUE_FULL, QUEUE_FULL, self._drained_s())
        if ticket.lane != EXPRESS:
            self._check_limit(ticket, slots)
        ticket.expected = self.expected_finish(ticket, now)
        if (
            self.config.admission.check_deadlines
            and self._policy(ticket.priority).timeout_action == "REJECT"
        ):
            late = ticket.expected + self.config.admission.margin * max(self.slack.value, 0.0)
            if late > ticket.deadline and (queues.count or ticket.expected > ticket.deadline):
                raise Rejected(
                    Kind.DEADLINE_INFEASIBLE, TIMED_OUT, max(late - ticket.deadline, 1e-3)
                )

    def _starts_now(self) -> bool:
        return not self.queues.count and not self._hold and bool(self.router.idle())

    def _check_limit(self, ticket: Ticket, slots: int) -> None:
        limit = self.limit_s
        if self.in_flight_s and self.in_flight_s + ticket.cost_s * self.gain > limit:
            tier = self.queues.tiers[ticket.tier]
            share = limit * tier.weight / self._weights
            if tier.in_flight_s + ticket.cost_s * self.gain > share:
                raise Rejected(Kind.OVERLOAD, QUEUE_FULL, self._drained_s())

    @property
    def limit_s(self) -> float:
        """Predicted engine seconds that may be in flight now, all slots together."""
        slots = len(self.router.slots)
        return self.limit.limit_s * slots * self._guard() / max(self.gain, 0.05)

    def expected_finish(self, ticket: Ticket, now: float) -> float:
        """When a new ticket would be answered, by what is running and goes before it."""
        running = self.router.running_s(now)
        slots = max(len(self.router.slots), 1)
        ahead = self.queues.express.queued_s
        if ticket.lane != EXPRESS and self.queues.count:
            own = self.queues.tiers[ticket.tier]
            mine = own.ahead_s(ticket.priority)
            ahead += mine
            turns = (mine + ticket.cost_s) / own.weight
            for other in self.queues.tiers.values():
                if other is not own and other.queued_s:
                    ahead += min(other.queued_s, turns * other.weight)
        if self.router.idle() and not self.queues.count:
            running = 0.0
        return now + (running + ahead * self.gain) / slots + ticket.cost_s

    def _drained_s(self) -> float:
        """Seconds until a quarter of the work in flight is done."""
        slots = max(len(self.router.slots), 1)
        return max(self.in_flight_s * self.gain / slots / 4, 1e-3)

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
        if self._policy(ticket.priority).timeout_action == "REJECT":
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
        if self._hold:
            if self.queues.count < self._hold:
                return False
            self._hold = 0
        now, queues, router = self.clock.now(), self.queues, self.router
        idle = router.idle()
        if not idle:
            return False
        if queues.express.count:
            part = queues.express.head()
            if part is None or self._too_late(part, now):
                return True
            queues.take(part)
            self._start(Batch([part], EXPRESS), router.fastest(idle, part.avoid), now)
            return True
        reserved = self.config.lanes.reserved_slots
        if reserved is None:
            reserved = 1 if len(router.slots) > 1 and self._uses_express() else 0
        if len(idle) <= min(reserved, len(router.slots) - 1):
            return False
        tier = queues.tier_next(now - self._age_s)
        seed = tier.head() if tier is not None else None
        if seed is None or self._too_late(seed, now):
            return seed is not None
        slot = router.pick(idle, seed, queues, self.gain, now)
        if slot is None or (wait := self.batcher.wait_until(seed, queues, slot, now)) > now:
            if slot is not None:
                self._wake_at(wait)
            return False
        parts = self.batcher.fill(seed, queues, slot.model, now, lambda p: self._too_late(p, now))
        self._start(Batch(parts, "standard"), slot, now)
        return True

    def _uses_express(self) -> bool:
        return bool(self.config.lanes.express_priorities) or any(
            t.express for t in self.config.tiers.values()
        )

    def _wake_at(self, when: float) -> None:
        if self._delay_timer is not None:
            self._delay_timer.cancel()
        self._delay_timer = self.clock.call_at(when, self.dispatch)

    def _too_late(self, part: Part, now: float) -> bool:
        """Whether the part cannot be done in time any more; it has then left the queue."""
        ticket = part.ticket
        if not self.config.admission.enabled or ticket.delayed:
            return False
        if now + part.cost_s <= ticket.deadline or not self.config.admission.check_deadlines:
            return False
        return self._timed_out(ticket)

    def _start(self, batch: Batch, slot: Slot, now: float) -> None:
        users = sum([p.users for p in batch.parts])
        batch.users, batch.rows = users, users * batch.padded
        batch.predicted_s = slot.model.predict(users, batch.rows)
        batch.started = now
        for part in batch.parts:
            ticket = part.ticket
            if ticket.state == QUEUED:
                ticket.state = RUNNING
                self.queues.bytes -= ticket.bytes
                self.queues.by_priority[ticket.priority] -= 1
            ticket.started, ticket.batch_rows, ticket.engine = now, batch.rows, slot.handle.name
        arrays = self.signature.join([p.arrays for p in batch.parts], batch.padded)
        self.router.start(slot, batch, self._stalled)
        slot.handle.run(arrays, lambda ran: self._ran(slot, batch, ran))

    def _ran(self, slot: Slot, batch: Batch, ran: Ran) -> None:
        """An engine has answered."""
        now = self.clock.now()
        if batch.given_up:
            # It hung, and its requests ran elsewhere; the engine is well again.
            self.router.end(slot, batch)
            return
        self.router.end(slot, batch)
        error = ran.error
        self._emit(
            BatchDone(
                now,
                self.name,
                self.version,
                slot.handle.name,
                batch.lane,
                len(batch.parts),
                batch.rows,
                ran.seconds,
                batch.predicted_s,
                "" if error is None else f"{type(error).__name__}: {error}",
            )
        )
        if error is None:
            self._learn(slot, batch, ran.seconds, now)
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
        elif isinstance(error, EngineDied):
            self.router.remove(slot)
            self._again(batch.parts, slot, error)
            self._on_lost(slot, "died")
        else:
            if self.router.failed(slot):
                self._on_lost(slot, "failing")
            self._again(batch.parts, slot, error)
        self.dispatch()

    def _learn(self, slot: Slot, batch: Batch, seconds: float, now: float) -> None:
        reference = slot.reference.predict(batch.users, batch.rows)
        if self.router.observe(slot, batch, seconds, now):
            self._on_lost(slot, "slow")
        if batch.lane != EXPRESS:
            cost = sum([p.cost_s for p in batch.parts])
            ratio = min(seconds / max(cost, 1e-9), 4.0)
            self.gain += 0.05 * (ratio - self.gain)
        slots = max(len(self.router.slots), 1)
        in_flight = self.in_flight_s * self.gain / slots
        if self.limit.sample(seconds / max(reference, 1e-9), in_flight):
            self._emit(LimitChanged(now, self.limit_s, self._guard(), "gradient"))

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
            ticket.outputs = self.signature.whole(
                [[p.outputs for p in chunk] for chunk in ticket.parts]
            )
            self._finish(ticket, None)

    def _finish(self, ticket: Ticket, error: Rejected | None) -> None:
        """The one place where a ticket ends."""
        now = self.clock.now()
        if ticket.state == QUEUED:
            self.queues.bytes -= ticket.bytes
            self.queues.by_priority[ticket.priority] -= 1
        for chunk in ticket.parts:
            for part in chunk:
                if part.state == QUEUED:
                    self.queues.remove(part)
                part.state = DONE
        ticket.state, ticket.error = DONE, error
        tier = self.queues.tiers[ticket.tier]
        del self.open[id(ticket)]
        if self.open:
            self.in_flight_s = max(self.in_flight_s - ticket.cost_s, 0.0)
            tier.in_flight_s = max(tier.in_flight_s - ticket.cost_s, 0.0)
        else:
            self.in_flight_s = 0.0
            for each in self.queues.tiers.values():
                each.in_flight_s = 0.0
        if error is None:
            self.served_s[ticket.tier] += ticket.cost_s
            if ticket.expected:
                self.slack.add(now - ticket.expected)
        self._tell(ticket, now, "ok" if error is None else str(error.kind))
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

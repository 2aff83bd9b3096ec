"""The scheduler of one model version: no threads, no sockets, no waiting. Everything that happens
is a call of one of its methods, in one thread.

    submit -> admitted or Rejected -> queued -> batch -> engine.run -> done(pending)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fastrec.serving.core.admission_controller import AdmissionController
from fastrec.serving.core.batcher import Batch, Batcher
from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.engines import EngineDied, EngineHandle, Ran
from fastrec.serving.core.events import BatchDone, Event, LimitChanged, RequestDone, Screened
from fastrec.serving.core.expiry import Expiries
from fastrec.serving.core.queues import (
    DONE,
    EXPRESS,
    QUEUED,
    RUNNING,
    STANDARD,
    PendingRequest,
    Queues,
    SubRequest,
)
from fastrec.serving.core.rate_limits import Gcra, quotas_of
from fastrec.serving.core.request import Kind, LoadReport, Rejected, Request
from fastrec.serving.core.request_policy import RequestPolicies
from fastrec.serving.core.router import Router, Slot
from fastrec.serving.core.signature import ModelSignature

# Added to the sort key of requests timed out under the DELAY policy, so that they run last.
_DELAY_S = 1e6
# How long after a refusal requests are checked before they are decoded.
_SHEDDING_S = 0.25


def _ignore(pending: PendingRequest) -> None:
    """For requests that nobody waits for."""


class Scheduler:
    """Queues, batches and routing for the engines of one model version, behind admission control.

    Args:
        name, version: of the model.
        signature: how its requests are cut and joined.
        quotas: tier -> its tenants' buckets, shared by all models.
        emit: receives every event.
        guard: the system guard's factor on the limit.
        on_lost: called for engines that died, hang, or were taken out.
    """

    def __init__(
        self,
        name: str,
        version: str,
        config: ServingConfig,
        clock: Clock,
        signature: ModelSignature,
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
        self._policies = RequestPolicies(config, goal_s if step is None else step / 1e3)
        self._age_s = 2 * max(goals) if age is None else age / 1e3
        self._uses_express = bool(config.lanes.express_priorities) or any(
            t.express for t in config.tiers.values()
        )
        self.queues = Queues({tier: t.weight for tier, t in config.tiers.items()})
        self.router = Router(config.pool, clock, signature.deep)
        self.batcher = Batcher(config.batching, signature, self.batch_s)
        self.admission = AdmissionController(
            name,
            config,
            self.queues,
            self.router,
            quotas=quotas_of(config) if quotas is None else quotas,
            guard=guard,
            goal_s=goal_s,
            batch_s=self.batch_s,
        )
        self.open: dict[int, PendingRequest] = {}
        self.queues.start_count = config.lanes.hold_until
        self._expiries = Expiries(clock, self._timed_out)
        self._delay_timer: Timer | None = None
        self._dispatching = False
        self.counts: dict[str, dict[str, int]] = {tier: {} for tier in config.tiers}
        self.served_s: dict[str, float] = dict.fromkeys(config.tiers, 0.0)

    # --- in

    def submit(self, pending: PendingRequest, arrays: tuple[np.ndarray, ...]) -> None:
        """Admit and queue a request, which starts at once where a slot is free.

        Raises:
            Rejected: QUOTA, OVERLOAD, QUEUE_FULL, DEADLINE_INFEASIBLE, EXPIRED, NOT_READY or
                INVALID; nothing was charged or queued.
        """
        now = self.clock.now()
        self._admit(pending, self.signature.size(arrays), now)
        self.admission.enter(pending, now)
        self.open[id(pending)] = pending
        self.batcher.split(pending, arrays, self.router.model, self._usable())
        if self._start_at_once(pending, now):
            return
        self.queues.enter(pending)
        self.dispatch()
        if pending.state == QUEUED and not pending.guaranteed:
            self._expiries.add(pending)

    def shedding(self) -> bool:
        """Whether no engine is idle and a request was just refused for lack of capacity."""
        return not self.router.idle() and self.clock.now() < self.admission.refused_at + _SHEDDING_S

    def turn_away(self, request: Request, size: tuple[int, int]) -> None:
        """Refuse a request as :meth:`submit` would, before its inputs are there; what is let pass
        here is submitted all the same.

        Args:
            size: users and candidates.

        Raises:
            Rejected: see :meth:`submit`.
        """
        self._admit(PendingRequest(request, (), _ignore), size, self.clock.now(), early=True)

    def _admit(
        self, pending: PendingRequest, size: tuple[int, int], now: float, *, early: bool = False
    ) -> None:
        try:
            self._describe(pending, size, now, early)
            self.admission.admit(pending, now)
        except Rejected as refusal:
            pending.state, pending.error = DONE, refusal
            self._tell(pending, now, refusal.kind.value)
            raise

    def _describe(
        self, pending: PendingRequest, size: tuple[int, int], now: float, early: bool
    ) -> None:
        """Fill in what follows from the request and the configuration."""
        request = pending.request
        pending.arrival = now
        policy = self._policies.of(request.tier, request.priority)
        if policy is None:
            pending.tier, pending.priority, pending.rows = self.config.default_tier, 0, 0
            wrong = f"tier: expected one of {sorted(self.config.tiers)}, got {request.tier!r}"
            raise Rejected(Kind.INVALID, wrong)
        pending.policy, pending.tier, pending.priority = policy, policy.tier, policy.priority
        pending.users, pending.candidates = users, candidates = size
        pending.rows = users * self.signature.deep(candidates)
        pending.cost_s = self.router.model.predict(users, pending.rows)
        deadline = request.deadline if policy.own_deadline else None
        pending.own_deadline = deadline is not None
        pending.deadline = now + policy.timeout_s if deadline is None else deadline
        pending.order = min(pending.deadline, now + self._age_s) + policy.later_s
        if (
            policy.express
            and pending.cost_s <= self.batch_s
            and self.admission.takes_express(pending.cost_s, now, charge=not early)
        ):
            pending.queue = EXPRESS

    def _start_at_once(self, pending: PendingRequest, now: float) -> bool:
        """Start a request that nothing is ahead of, past the queue: most are such while there is
        no overload. Other cases go through the queue, with the same result."""
        if (
            self.queues.count
            or pending.sub_count != 1
            or self.queues.start_count
            or self._dispatching
            or self.config.batching.max_delay_ms
        ):
            return False
        sub = pending.subs[0][0]
        if self._is_late(sub, now):
            return False
        slot = self._slot_for(sub, now)
        if slot is None:
            return False
        self.queues.pass_by(sub)
        pending.state = RUNNING
        self._start([sub], pending.queue, slot, now)
        return True

    def load(self, users: int = 0, rows: int = 0) -> LoadReport:
        """Expected latency here, for callers that choose between hosts.

        Args:
            users, rows: of the request that would follow; 0 = usual ones.
        """
        if not self.router.slots:
            return LoadReport(False, len(self.open))
        model = self.router.model
        users = users or 1
        own_s = model.predict(users, rows or users * model.usual_rows)
        latency_s = self.admission.backlog_s(self.clock.now()) + own_s
        each_s = own_s * self.admission.gain / len(self.router.slots)
        return LoadReport(True, len(self.open), latency_s, each_s)

    # --- out, before the end

    def cancel(self, pending: PendingRequest) -> None:
        """Take a request back; it leaves the queue at once."""
        if pending.state != DONE:
            self._finish(pending, Rejected(Kind.CANCELLED, "the request was cancelled"))

    def fail_all(self, kind: Kind, why: str) -> None:
        """Answer everything open with a refusal."""
        for pending in list(self.open.values()):
            self._finish(pending, Rejected(kind, why))

    def _timed_out(self, pending: PendingRequest) -> bool:
        """Whether it left the queue (under DELAY it moves behind all others instead)."""
        if pending.policy.rejects:
            self._finish(pending, Rejected(Kind.EXPIRED, self.admission.timed_out(pending)))
            return True
        if not pending.delayed:
            pending.delayed = True
            subs = [p for chunk in pending.subs for p in chunk if p.state == QUEUED]
            for sub in subs:
                self.queues.remove(sub)
            pending.order += _DELAY_S
            for sub in subs:
                sub.state = QUEUED
                self.queues.push(sub)
        return False

    # --- engines

    def add_engine(self, handle: EngineHandle, slot: Slot | None = None) -> Slot:
        """A warm engine takes requests from now on."""
        slot = self.router.add(handle) if slot is None else self.router.put(slot)
        self.dispatch()
        return slot

    def remove_engine(self, slot: Slot) -> None:
        """Give an engine no more calls; its running call is finished."""
        self.router.remove(slot)

    def found_dead(self, slot: Slot) -> None:
        """An idle engine died; the death of a busy one shows in its call."""
        if slot.batch is None and slot in self.router.slots:
            self.router.remove(slot)
            self._on_lost(slot, "died")

    # --- batches

    def dispatch(self) -> None:
        """Start the calls that can start; called when work arrives or an engine becomes free."""
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
        if queues.start_count:
            if queues.count < queues.start_count:
                return False
            queues.start_count = 0
        if not self.router.idle():
            return False
        if queues.express.count:
            sub = queues.express.head()
            if sub is None or self._too_late(sub, now):
                return True
            slot = self._slot_for(sub, now)
            assert slot is not None
            queues.take(sub)
            self._start([sub], EXPRESS, slot, now)
            return True
        if self._usable() <= 0:
            return False
        tier = queues.tier_next(now - self._age_s)
        seed = tier.head() if tier is not None else None
        if seed is None or self._too_late(seed, now):
            return seed is not None
        slot = self._slot_for(seed, now)
        if slot is None:
            return False
        wait = self.batcher.wait_until(seed, queues, slot.model, now)
        if wait > now:
            self._wake_at(wait)
            return False
        engines = len(self.router.slots)
        subs = self.batcher.fill(
            seed, queues, slot.model, now, engines, lambda p: self._too_late(p, now)
        )
        self._start(subs, STANDARD, slot, now)
        return True

    def _slot_for(self, sub: SubRequest, now: float) -> Slot | None:
        """The idle engine for the call that ``sub`` begins; None = it has to wait."""
        router = self.router
        idle = router.idle()
        if sub.pending.queue == EXPRESS:
            return router.fastest(idle, sub.avoid) if idle else None
        if self._usable() <= 0:
            return None
        return router.pick(idle, sub, self.queues, self.admission.gain, now)

    def _usable(self) -> int:
        """Idle engines that are not reserved for express requests."""
        slots, idle = len(self.router.slots), len(self.router.idle())
        reserved = self.config.lanes.reserved_slots
        if reserved is None:
            reserved = 1 if self._uses_express else 0
        return idle - min(reserved, max(slots - 1, 0))

    def _wake_at(self, when: float) -> None:
        if self._delay_timer is not None:
            self._delay_timer.cancel()
        self._delay_timer = self.clock.call_at(when, self.dispatch)

    def _is_late(self, sub: SubRequest, now: float) -> bool:
        """Whether the sub-request cannot be done in time any more."""
        pending, admission = sub.pending, self.config.admission
        return (
            now + sub.cost_s > pending.deadline
            and admission.enabled
            and admission.check_deadlines
            and not pending.delayed
            and not pending.guaranteed
        )

    def _too_late(self, sub: SubRequest, now: float) -> bool:
        """Whether the sub-request is late and has therefore left the queue."""
        return self._is_late(sub, now) and self._timed_out(sub.pending)

    def _start(self, subs: list[SubRequest], queue: str, slot: Slot, now: float) -> None:
        rows = self.signature.deep(subs[0].key[0])
        batch = Batch(subs, queue, rows, slot.model, now)
        name, rows = slot.handle.name, batch.rows
        for sub in subs:
            pending = sub.pending
            if pending.state == QUEUED:
                pending.state = RUNNING
                self.queues.leave(pending)
            pending.started, pending.batch_rows, pending.engine = now, rows, name
        arrays = subs[0].arrays
        if len(subs) > 1 or subs[0].candidates != batch.padded:
            arrays = self.signature.join([p.arrays for p in subs], batch.padded)
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
                batch.queue,
                len(batch.subs),
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
            self._again(batch.subs, slot, error)
            self._on_lost(slot, "died")
        else:
            if self.router.failed(slot):
                self._on_lost(slot, "failing")
            self._again(batch.subs, slot, error)
        if self.queues.count:
            self.dispatch()

    def _answered(self, batch: Batch, ran: Ran) -> None:
        """Give each sub-request of a call its outputs."""
        start = 0
        for sub in batch.subs:
            if sub.state == RUNNING:
                sub.outputs = (
                    self.signature.slice_outputs(ran.outputs, start, sub.users, sub.candidates)
                    if len(batch.subs) > 1 or sub.candidates != batch.padded
                    else ran.outputs
                )
                self._sub_done(sub, ran.seconds)
            start += sub.users

    def _learn(self, slot: Slot, batch: Batch, seconds: float, now: float) -> None:
        usual_s = slot.reference.predict(batch.users, batch.rows)
        if self.router.observe(slot, batch, seconds, now):
            self._on_lost(slot, "slow")
        cost_s = 0.0 if batch.queue == EXPRESS else sum([p.cost_s for p in batch.subs])
        admission = self.admission
        if admission.learn(seconds, usual_s, cost_s):
            self._emit(LimitChanged(now, admission.limit_s, admission.guard(), "gradient"))

    def _stalled(self, slot: Slot, batch: Batch) -> None:
        """A call takes far too long: run its requests elsewhere, take the engine out."""
        batch.given_up = True
        self.router.remove(slot)
        self._again(batch.subs, slot, EngineDied(f"{slot.handle.name} does not answer"))
        self._on_lost(slot, "stalled")
        self.dispatch()

    def _again(self, subs: list[SubRequest], slot: Slot, error: Exception) -> None:
        """Retry sub-requests whose engine failed, on another engine if possible."""
        for sub in subs:
            pending = sub.pending
            if sub.state != RUNNING:
                continue
            died = isinstance(error, EngineDied)
            # Of several sub-requests in a failed call, one may be the cause; the others are well.
            culprit_unknown = len(subs) > 1
            retry = died or culprit_unknown or len(self.router.slots) > 1
            if not retry or pending.tries >= self.config.pool.max_tries:
                kind = Kind.NOT_READY if died else Kind.INTERNAL
                self._finish(pending, Rejected(kind, f"{type(error).__name__}: {error}"))
                continue
            pending.tries += 1
            sub.solo = sub.solo or (culprit_unknown and not died)
            sub.avoid = slot
            sub.state = QUEUED
            self.queues.push(sub)
            if not pending.guaranteed:
                self._expiries.add(pending)

    def _sub_done(self, sub: SubRequest, seconds: float) -> None:
        sub.state = DONE
        pending = sub.pending
        pending.compute_s = max(pending.compute_s, seconds)
        pending.open_subs -= 1
        if pending.open_subs == 0:
            pending.outputs = (
                sub.outputs
                if pending.sub_count == 1
                else self.signature.join_outputs(
                    [[p.outputs for p in chunk] for chunk in pending.subs]
                )
            )
            self._finish(pending, None)

    def _finish(self, pending: PendingRequest, error: Rejected | None) -> None:
        """The one place where a request ends."""
        now = self.clock.now()
        if error is not None:
            if pending.state == QUEUED:
                self.queues.leave(pending)
            for chunk in pending.subs:
                for sub in chunk:
                    if sub.state == QUEUED:
                        self.queues.remove(sub)
                    sub.state = DONE
        pending.state, pending.error = DONE, error
        del self.open[id(pending)]
        self.admission.leave(pending, last=not self.open)
        if error is None:
            self.served_s[pending.tier] += pending.cost_s
            if pending.expected:
                self.admission.slack[pending.tier].add(now - pending.expected)
        self._tell(pending, now, "ok" if error is None else error.kind.value)
        pending.done(pending)
        pending.subs = []

    def _tell(self, pending: PendingRequest, now: float, outcome: str) -> None:
        counts = self.counts[pending.tier]
        counts[outcome] = counts.get(outcome, 0) + 1
        queue_s = (pending.started or now) - pending.arrival
        self._emit(
            RequestDone(
                now,
                self.name,
                self.version,
                pending.tier,
                pending.queue,
                pending.priority,
                outcome,
                pending.rows,
                queue_s,
                pending.compute_s,
                now - pending.arrival,
                pending.request.id,
            )
        )

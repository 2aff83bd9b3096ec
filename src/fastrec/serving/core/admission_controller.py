"""Admission: which requests are accepted, and how much engine time is in flight.

Nothing is charged before a request is admitted. Costs are predicted engine seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.latency import Quantile
from fastrec.serving.core.queues import EXPRESS, PendingRequest, Queues
from fastrec.serving.core.rate_limits import Gcra, Limit
from fastrec.serving.core.request import QUEUE_FULL, TIMED_OUT, Kind, Rejected
from fastrec.serving.core.router import Router


class AdmissionController:
    """Quotas, the queue's bounds, the concurrency limit and deadlines of one model version.

    Args:
        name: of the model.
        quotas: tier -> its tenants' buckets.
        guard: the system guard's factor on the limit.
        goal_s: the shortest latency goal.
        batch_s: the longest predicted call.

    Attributes:
        gain: time of calls over the summed costs of their sub-requests; below 1 through batching.
        in_flight_s: costs of all admitted requests that are not answered.
        refused_at: when a request was last refused for lack of capacity.
        slack: how much later than expected a tier's answers come: 995 of 1000 come no later than
            this. Later requests pass those of a tier that has had its share, so each has its own.
    """

    def __init__(
        self,
        name: str,
        config: ServingConfig,
        queues: Queues,
        router: Router,
        *,
        quotas: dict[str, Gcra],
        guard: Callable[[], float],
        goal_s: float,
        batch_s: float,
    ) -> None:
        self.name, self.config = name, config
        self.queues, self.router, self.quotas = queues, router, quotas
        self.limit = Limit(config.admission, goal_s, batch_s)
        self.guard = guard
        self.gain = 1.0
        self.in_flight_s = 0.0
        self.refused_at = -float("inf")
        self.slack = {tier: Quantile(0.995, goal_s / 200) for tier in config.tiers}
        self._goal_s, self._batch_s = goal_s, batch_s
        self._weights = sum(t.weight for t in config.tiers.values())
        self._express_bucket: Gcra | None = None
        self._express_slots = 0

    @property
    def limit_s(self) -> float:
        """Predicted engine seconds that may be in flight now, all slots together."""
        slots = len(self.router.slots)
        return self.limit.limit_s * slots * self.guard() / max(self.gain, 0.05)

    def admit(self, pending: PendingRequest, now: float) -> None:
        """Check a request without charging anything.

        Raises:
            Rejected: NOT_READY, QUOTA, EXPIRED, QUEUE_FULL, OVERLOAD or DEADLINE_INFEASIBLE.
        """
        slots = len(self.router.slots)
        admission = self.config.admission
        if not slots:
            why = f"model '{self.name}' has no engine that can run"
            raise Rejected(Kind.NOT_READY, why, 1.0 if admission.enabled else None)
        if not admission.enabled:
            return
        quota = self.quotas.get(pending.tier)
        if quota is not None:
            wait = quota.wait_s(pending.request.tenant, pending.cost_s * 1e6, now)
            if wait > 0:
                raise Rejected(Kind.QUOTA, f"the quota of tier '{pending.tier}' is used up", wait)
        if pending.deadline <= now:
            raise Rejected(Kind.EXPIRED, TIMED_OUT)
        try:
            self._check_room(pending)
            if pending.queue != EXPRESS:
                self._check_limit(pending, slots)
            self._check_deadline(pending, now)
        except Rejected:
            self.refused_at = now
            raise

    def _check_deadline(self, pending: PendingRequest, now: float) -> None:
        pending.expected = self.expected_finish(pending, now)
        admission = self.config.admission
        if not admission.check_deadlines or not pending.policy.rejects:
            return
        slack = max(self.slack[pending.tier].value, 0.0)
        late = pending.expected + admission.margin * slack
        waiting = self.queues.count > 0
        if not waiting and self.router.idle() and not pending.own_deadline:
            # It can start at once, and only the server's own goal could say that it takes too long.
            pending.guaranteed = True
            return
        if late <= pending.deadline or not (waiting or pending.expected > pending.deadline):
            return
        raise Rejected(
            Kind.DEADLINE_INFEASIBLE,
            self.timed_out(pending),
            max(late - pending.deadline, 1e-3),
        )

    def timed_out(self, pending: PendingRequest) -> str:
        """Triton's text, with the time that has passed where the request names none."""
        if pending.own_deadline:
            return TIMED_OUT
        limit_ms = 1e3 * pending.policy.timeout_s
        return f"{TIMED_OUT}: {limit_ms:g} ms, the limit of tier '{pending.tier}', as it names none"

    def _check_room(self, pending: PendingRequest) -> None:
        """The queue's own bounds; an empty one always has room."""
        queues, queueing = self.queues, self.config.lanes
        most = pending.policy.most_queued
        full = bool(most) and queues.by_priority.get(pending.priority, 0) >= most
        if full and not queues.count and not queues.start_count and self.router.idle():
            full = False
        if full or queues.count >= queueing.max_queued:
            raise Rejected(Kind.QUEUE_FULL, QUEUE_FULL, self._drained_s())
        if queues.bytes and queues.bytes + pending.bytes > queueing.max_queued_bytes:
            raise Rejected(Kind.QUEUE_FULL, QUEUE_FULL, self._drained_s())

    def _check_limit(self, pending: PendingRequest, slots: int) -> None:
        """Below the limit a request is admitted in full even if it then exceeds it: otherwise a
        large request would be refused at a limit that is half used. Deadlines are checked apart."""
        # limit_s, with the gain on the other side.
        limit = self.limit.limit_s * slots * self.guard()
        gain = max(self.gain, 0.05)
        if self.in_flight_s * gain > limit:
            tier = self.queues.tiers[pending.tier]
            # The tier's guaranteed share of the goal. The limit leaves room for one call below the
            # goal; the guarantee need not, since deadlines are checked as well.
            reach = max(self._goal_s / self.limit.high_s, 1.0)
            share = limit * reach * tier.weight / self._weights
            if tier.in_flight_s * gain > share:
                raise Rejected(Kind.OVERLOAD, QUEUE_FULL, self._drained_s())

    def expected_finish(self, pending: PendingRequest, now: float) -> float:
        """When a new request would be answered, given the work that runs or goes before it."""
        queues, router = self.queues, self.router
        if not queues.count and router.idle():
            return now + pending.cost_s
        ahead = queues.express.queued_s
        if pending.queue != EXPRESS and queues.count:
            own = queues.tiers[pending.tier]
            mine = own.ahead_s(pending.priority)
            ahead += mine
            turns = (mine + pending.cost_s) / own.weight
            for other in queues.tiers.values():
                if other is not own and other.queued_s:
                    ahead += min(other.queued_s, turns * other.weight)
        slots = max(len(router.slots), 1)
        return now + (router.running_s(now) + ahead * self.gain) / slots + pending.cost_s

    def backlog_s(self, now: float) -> float:
        """Seconds until all admitted work has at least begun."""
        queues, router = self.queues, self.router
        if not queues.count and router.idle():
            return 0.0
        queued = queues.express.queued_s + queues.queued_s()
        return (router.running_s(now) + queued * self.gain) / max(len(router.slots), 1)

    def _drained_s(self) -> float:
        """Seconds until a quarter of the work in flight is done."""
        slots = max(len(self.router.slots), 1)
        return max(self.in_flight_s * self.gain / slots / 4, 1e-3)

    def takes_express(self, cost_s: float, now: float, *, charge: bool = True) -> bool:
        """Whether the express queue has room for ``cost_s``; if so, it is charged."""
        share, slots = self.config.lanes.express_share, len(self.router.slots)
        if share >= 1:
            return True
        bucket = self._express_bucket
        if bucket is None or slots != self._express_slots:
            rate = max(share * max(slots, 1), 1e-9)
            bucket = Gcra(rate, max(rate * self._goal_s * 4, self._batch_s))
            self._express_bucket, self._express_slots = bucket, slots
        if bucket.wait_s("", cost_s, now) > 0:
            return False
        if charge:
            bucket.spend("", cost_s, now)
        return True

    def enter(self, pending: PendingRequest, now: float) -> None:
        """Charge an admitted request."""
        quota = self.quotas.get(pending.tier)
        if quota is not None:
            quota.spend(pending.request.tenant, pending.cost_s * 1e6, now)
        self.in_flight_s += pending.cost_s
        self.queues.tiers[pending.tier].in_flight_s += pending.cost_s

    def leave(self, pending: PendingRequest, *, last: bool) -> None:
        """Uncharge an answered request; ``last``: nothing else is in flight."""
        tiers = self.queues.tiers
        if last:
            # Also drops what rounding left over.
            self.in_flight_s = 0.0
            for each in tiers.values():
                each.in_flight_s = 0.0
            return
        tier = tiers[pending.tier]
        self.in_flight_s = max(self.in_flight_s - pending.cost_s, 0.0)
        tier.in_flight_s = max(tier.in_flight_s - pending.cost_s, 0.0)

    def learn(self, seconds: float, usual_s: float, cost_s: float) -> bool:
        """Learn from a finished call.

        Args:
            seconds: what the call took.
            usual_s: what such a call takes on an idle machine.
            cost_s: predicted cost of its sub-requests; 0 for express ones.

        Returns:
            whether the limit moved.
        """
        if cost_s:
            self.gain += 0.05 * (min(seconds / cost_s, 4.0) - self.gain)
        in_flight = self.in_flight_s * self.gain / max(len(self.router.slots), 1)
        return self.limit.sample(seconds / max(usual_s, 1e-9), in_flight)

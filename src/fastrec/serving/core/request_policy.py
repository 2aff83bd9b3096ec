"""How a request of a tier and priority level is treated, computed once for each pair."""

from __future__ import annotations

from typing import NamedTuple

from fastrec.serving.core.config import ServingConfig


class RequestPolicy(NamedTuple):
    """How requests of one tier and priority level are treated.

    Attributes:
        tier: its name.
        priority: the level, within the configured ones.
        timeout_s: of requests without a deadline.
        own_deadline: whether a request's own deadline counts.
        later_s: how much later than its deadline it is ordered (negative: earlier).
        express: whether it may take the express queue.
        rejects: whether it is refused when it times out, or (DELAY) goes behind all others.
        most_queued: requests of the level that may wait; 0 = no limit of its own.
    """

    tier: str
    priority: int
    timeout_s: float
    own_deadline: bool
    later_s: float
    express: bool
    rejects: bool
    most_queued: int


class RequestPolicies:
    """The policies of all tiers and levels, from the configuration.

    Args:
        step_s: how much earlier than its own each higher level's deadline counts.
    """

    def __init__(self, config: ServingConfig, step_s: float) -> None:
        self._config, self._step_s = config, step_s
        self._known: dict[tuple[str, int], RequestPolicy] = {}

    def of(self, tier: str, priority: int) -> RequestPolicy | None:
        """The policy of a tier and priority ("" and 0 are the defaults); None: an unknown tier."""
        known = self._known.get((tier, priority))
        return self._make(tier, priority) if known is None else known

    def _make(self, named: str, asked: int) -> RequestPolicy | None:
        config, queueing = self._config, self._config.lanes
        tier = named or config.default_tier
        if tier not in config.tiers:
            return None
        level = min(max(asked or queueing.default_priority, 1), queueing.priority_levels)
        queue_policy = queueing.policies.get(level, queueing.default_policy)
        policy = RequestPolicy(
            tier,
            level,
            queue_policy.default_timeout_us / 1e6 or config.latency_s(tier),
            queue_policy.allow_timeout_override,
            (level - queueing.default_priority) * self._step_s,
            level in queueing.express_priorities or (config.tiers[tier].express and not asked),
            queue_policy.timeout_action == "REJECT",
            queue_policy.max_queue_size,
        )
        # Clients may name any number: those beyond the levels are not kept.
        if asked in (0, level):
            self._known[named, asked] = policy
        return policy

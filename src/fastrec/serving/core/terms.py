"""What a tier and a priority level mean for a request, worked out once for each pair that comes."""

from __future__ import annotations

from typing import NamedTuple

from fastrec.serving.core.config import ServingConfig


class Terms(NamedTuple):
    """Of one tier and level.

    Attributes:
        tier: its name.
        priority: the level, within the configured ones.
        timeout_s: of requests without a deadline.
        own_deadline: whether a request's own deadline counts.
        later_s: how much later than its deadline it is ordered (negative: earlier).
        express: whether it may take the express lane.
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


class TermsTable:
    """The terms of every pair, as the configuration has them.

    Args:
        step_s: how much earlier than its own each higher level's deadline counts.
    """

    def __init__(self, config: ServingConfig, step_s: float) -> None:
        self._config, self._step_s = config, step_s
        self._known: dict[tuple[str, int], Terms] = {}

    def of(self, tier: str, priority: int) -> Terms | None:
        """Terms of what a request names ("" and 0 are the defaults); None for an unknown tier."""
        known = self._known.get((tier, priority))
        return self._make(tier, priority) if known is None else known

    def _make(self, named: str, asked: int) -> Terms | None:
        config, lanes = self._config, self._config.lanes
        tier = named or config.default_tier
        if tier not in config.tiers:
            return None
        level = min(max(asked or lanes.default_priority, 1), lanes.priority_levels)
        policy = lanes.policies.get(level, lanes.default_policy)
        terms = Terms(
            tier,
            level,
            policy.default_timeout_us / 1e6 or config.latency_s(tier),
            policy.allow_timeout_override,
            (level - lanes.default_priority) * self._step_s,
            level in lanes.express_priorities or (config.tiers[tier].express and not asked),
            policy.timeout_action == "REJECT",
            policy.max_queue_size,
        )
        # Clients may name any number: those beyond the levels are not kept.
        if asked in (0, level):
            self._known[named, asked] = terms
        return terms

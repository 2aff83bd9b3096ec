"""How many replicas there should be.

Engines' busy time is proportional to load, so it says how many replicas it takes; the queue's delay
says that this was wrong (slower nodes, heavier requests, bursts), and asks for more, at most twice
as many at a time. Delays of scaling up and down are Ray's.

Ray copies this module by value to its controller: it keeps to itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class QueueDelay:
    """A policy of Ray Serve's autoscaler.

    Args:
        goal_s: the queue's delay (95th percentile of a replica) that is fine, in seconds.
        busy: the share of time that engines should be at work.
    """

    def __init__(self, goal_s: float, busy: float) -> None:
        self.goal_s, self.busy = goal_s, busy

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and nothing to remember."""
        metrics = ctx.aggregated_metrics or {}
        now = max(ctx.current_num_replicas, 1)
        busy, delays = (list((metrics.get(n) or {}).values()) for n in ("busy", "queue_delay_s"))
        if not busy or not delays:
            return ctx.target_num_replicas, {}
        # Replicas without reports yet are new: the others do the work.
        wanted = math.ceil(sum(busy) / self.busy - 1e-9)
        late = sum(delays) / len(delays) / self.goal_s
        if late > 1:
            wanted = max(wanted, now + math.ceil(now * min(late - 1, 1.0)))
        least, most = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {}

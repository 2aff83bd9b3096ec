"""Which replica a request goes to: the one expected to answer first, the way there included.

A replica tells where it is and how long new work would wait; a caller knows where it is itself. The
sum of the way and the wait orders the replicas, so that requests stay on their node, in their zone
and in their region as long as that is the fastest, and go elsewhere when it is not.

Ray copies this module by value to where routers run: it keeps to itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import ray
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

# What KubeRay and Ray's autoscaler call them.
REGION, ZONE = "ray.io/availability-region", "ray.io/availability-zone"


def place() -> tuple[str, str, str]:
    """Region, zone and node of this process; "" for what the node's labels do not say."""
    context = ray.get_runtime_context()
    labels: Any = context.get_node_labels() or {}
    return labels.get(REGION, ""), labels.get(ZONE, ""), context.get_node_id()


def way(here: Sequence[str], there: Sequence[str]) -> int:
    """0 on the same node, 1 in the same zone, 2 in the same region, 3 elsewhere.

    Nodes without labels are in one region.
    """
    if here[2] == there[2]:
        return 0
    if here[0] != there[0]:
        return 3
    return 1 if here[1] == there[1] and here[1] else 2


def ranks(
    replicas: Sequence[RunningReplica],
    here: Sequence[str],
    network_s: Sequence[float],
    near_s: float = 0.001,
) -> list[list[RunningReplica]]:
    """Replicas by when they are expected to answer.

    Of those within ``near_s`` of the best, two at random come first: with reports a second
    old, all callers would otherwise send to the same one (Ray takes the one of the two with
    fewer requests). The others follow, the best first.

    Args:
        replicas: to choose from, at least one.
        here: region, zone and node of the caller.
        network_s: cost of each kind of :func:`way`, in seconds.
        near_s: expected times this close count as equal.
    """
    scored = []
    for replica in replicas:
        stats = replica.routing_stats or {}
        there = stats.get("place") or ("?", "", replica.node_id)
        scored.append((network_s[way(here, there)] + stats.get("wait_s", 0.0), replica))
    scored.sort(key=lambda pair: pair[0])
    near = [r for score, r in scored if score <= scored[0][0] + near_s]
    first = random.sample(near, min(2, len(near)))
    return [first, *([r] for _, r in scored if r not in first)]


class NearestRouter(FIFOMixin, RequestRouter):
    """Ray Serve's router, with :func:`ranks` as its choice."""

    def initialize_state(self, network_s: Sequence[float] = (0.0, 0.0005, 0.002, 0.08)) -> None:
        """Called by Ray.

        Args:
            network_s: what each kind of :func:`way` costs.
        """
        self._network_s = tuple(network_s)
        self._here = place()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Called by Ray, once a request and attempt."""
        free = self.select_available_replicas(candidate_replicas)
        return ranks(free, self._here, self._network_s) if free else []

"""Snapshot of a scheduler's state, for statistics and the status page."""

from __future__ import annotations

from typing import Any

from fastrec.serving.core.scheduler import Scheduler


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """Queues, limits, learnt costs and engines, in plain JSON types."""
    return {
        "queued": scheduler.queues.count,
        "queued_bytes": scheduler.queues.bytes,
        "open": len(scheduler.open),
        "in_flight_s": scheduler.admission.in_flight_s,
        "limit_s": scheduler.admission.limit_s,
        "batch_gain": scheduler.admission.gain,
        "batch_cap_s": scheduler.batch_s,
        "latency_model": {
            "per_call_s": scheduler.router.model.beta,
            "per_user_s": scheduler.router.model.gamma,
            "per_row_s": scheduler.router.model.alpha,
        },
        "joins": scheduler.signature.joins,
        "separable": scheduler.signature.separable,
        "tiers": {
            name: {
                "queued": q.count,
                "queued_s": q.queued_s,
                "in_flight_s": q.in_flight_s,
                "slack_s": scheduler.admission.slack[name].value,
                "outcomes": dict(scheduler.counts[name]),
                "served_s": scheduler.served_s[name],
            }
            for name, q in scheduler.queues.tiers.items()
        },
        "express": {"queued": scheduler.queues.express.count},
        "engines": scheduler.router.snapshot(scheduler.clock.now()),
    }

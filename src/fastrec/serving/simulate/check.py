"""The simulation against the real thing: one host, the same requests, a clock of each kind.

The real side is :class:`fastrec.serving.core.InferenceCore` in an event loop, with engines in
threads that sleep for what the profile says. The two sides draw for themselves, from the same
distributions, so they should show the same latencies but for what Python and the operating system
add.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import numpy as np

from fastrec.measure.latency import LatencyHistogram
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.inference_core import InferenceCore
from fastrec.serving.core.request import Rejected, Request
from fastrec.serving.simulate.fleet import Fleet, simulate
from fastrec.serving.simulate.profile import EngineProfile
from fastrec.spec import InputField, InputSpec


class _Sleeper:
    """Takes a profile's time, without a core."""

    spec = InputSpec((InputField("candidate", ("B", "m"), rows=2),), {"m": (1, None)})

    def __init__(self, profile: EngineProfile, seed: int) -> None:
        self._seconds = profile.sampler(random.Random(seed))

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        (candidate,) = inputs
        users, candidates = candidate.shape
        time.sleep(self._seconds(users, users * candidates))
        return candidate.astype(np.float32)


async def _real(
    fleet: Fleet, profile: EngineProfile, config: ServingConfig
) -> tuple[LatencyHistogram, dict[str, int]]:
    core = InferenceCore(config)
    seeds = iter(range(1 << 30))
    await core.load(
        "ranker", lambda: _Sleeper(profile, next(seeds)), engines=fleet.host_engines, kind="thread"
    )
    rng = np.random.default_rng(fleet.seed)
    count = int(fleet.rate * (fleet.warm_s + fleet.seconds))
    times = np.cumsum(rng.exponential(1 / fleet.rate, count))
    shares = np.array(list(fleet.candidates.values()), float)
    sizes = rng.choice(list(fleet.candidates), count, p=shares / shares.sum())
    latency, outcomes = LatencyHistogram(), dict[str, int]()
    begin = time.monotonic() + 0.05

    async def one(when: float, size: int) -> None:
        outcome, sent = "ok", time.monotonic()
        try:
            await core.infer(Request("ranker", "", {"candidate": np.zeros((1, size), np.int64)}))
        except Rejected as refused:
            outcome = refused.kind.value
        if when < fleet.warm_s:
            return
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == "ok":
            latency.add(round((time.monotonic() - sent) * 1e9))

    tasks = []
    for when, size in zip(times.tolist(), sizes.tolist(), strict=True):
        wait = begin + when - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(when, size)))
    await asyncio.gather(*tasks)
    await core.close()
    return latency, outcomes


def check(
    fleet: Fleet, profile: EngineProfile, config: ServingConfig | None = None
) -> dict[str, Any]:
    """Both sides of one host of ``fleet`` at its share of the rate, for ``fleet.seconds``.

    Returns:
        ``{"rate": r, "engines": n, "real": {...}, "simulated": {...}}`` with ``p50_ms``,
        ``p99_ms`` and ``outcomes`` of each side.
    """
    config = config or ServingConfig()
    engines = fleet.host_engines
    one = Fleet(
        engines=engines, host_engines=engines, cell_hosts=1, callers=1, policy="random",
        rate=fleet.rate * engines / fleet.engines, seconds=fleet.seconds, warm_s=fleet.warm_s,
        round_trip_us=0.0, candidates=fleet.candidates, seed=fleet.seed,
    )  # fmt: skip
    (simulated,) = simulate(one, profile, config)
    latency, outcomes = asyncio.run(_real(one, profile, config))
    return {
        "rate": one.rate,
        "engines": engines,
        "real": _told(latency, outcomes),
        "simulated": _told(simulated.latency, simulated.outcomes),
    }


def _told(latency: LatencyHistogram, outcomes: dict[str, int]) -> dict[str, Any]:
    told: dict[str, Any] = {"outcomes": outcomes, "p50_ms": None, "p99_ms": None}
    if latency.count:
        told |= {"p50_ms": latency.percentile_ms(50), "p99_ms": latency.percentile_ms(99)}
    return told

"""Hosts, callers and the wire between them, in virtual time.

What is real: every host runs :class:`fastrec.serving.core.scheduler.Scheduler`, the very code that
serves, with its admission, queues, batches, routing and learning; callers route with the very
:class:`fastrec.serving.core.probes.ProbePool` of the client. What is modelled: an engine's time is
drawn from a measured profile, a message takes half a round trip, and a host's one event loop takes
``event_loop_us`` of each request, one after another.

Not every host need be simulated. The fleet is cut into equal cells, and callers of a cell probe
and use hosts of that cell alone, as subsetting does in large fleets. A Poisson stream that is dealt
out at random is a Poisson stream in each part, so all cells are copies of each other in
distribution, and ``cells`` of them (each with a seed of its own) say what every one does. For a
fleet of such cells that is exact up to the sampling error, which the spread over cells shows; for
callers that probe the whole fleet it is an approximation, since a host's neighbours then differ
from request to request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError
from fastrec.measure.latency import LatencyHistogram
from fastrec.serving.core.clock import VirtualClock
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.probes import ProbePool, Probing
from fastrec.serving.core.queues import PendingRequest
from fastrec.serving.core.request import LoadReport, Rejected, Request
from fastrec.serving.core.scheduler import Scheduler
from fastrec.serving.core.signature import Arrays, ModelSignature, Outputs
from fastrec.serving.simulate.profile import EngineProfile
from fastrec.serving.simulated import add_engines
from fastrec.spec import InputField, InputSpec

POLICIES = ("probes", "random", "round_robin", "least")
_CHUNK = 4096


@dataclass(frozen=True)
class Fleet:
    """A fleet and its traffic.

    Args:
        engines: in the whole fleet.
        host_engines: of one host, which is one server process with one scheduler.
        cell_hosts: hosts that callers of a cell know.
        cells: simulated ones, at most all.
        rate: requests a second in the whole fleet.
        seconds: of virtual time, after ``warm_s`` uncounted ones.
        callers: of a cell; each has its own probes.
        policy: "probes" (Prequal), "random", "round_robin" (by each caller), or "least": fewest
            requests in flight of all the cell's hosts, known without delay, which no real router
            knows.
        probing: of policy "probes".
        round_trip_us: there and back, between a caller and a host.
        event_loop_us: event loop time of a request, before the scheduler has it; 0 = nothing.
        candidates: candidates of a request -> share of the requests.
        tiers: tier -> share of the requests.
        slow_share: share of hosts with slower engines.
        slow_factor: their engines' times, as a multiple of the profile's.
        seed: of everything drawn.

    Raises:
        ArgumentError: a value that makes no fleet.
    """

    engines: int = 10_000
    host_engines: int = 10
    cell_hosts: int = 50
    cells: int = 1
    rate: float = 1e7
    seconds: float = 1.0
    warm_s: float = 0.3
    callers: int = 50
    policy: str = "probes"
    probing: Probing = field(default_factory=Probing)
    round_trip_us: float = 200.0
    event_loop_us: float = 0.0
    candidates: Mapping[int, float] = field(default_factory=lambda: {50: 1.0})
    tiers: Mapping[str, float] = field(default_factory=dict)
    slow_share: float = 0.0
    slow_factor: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("engines", "host_engines", "cell_hosts", "cells", "callers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(name, "a whole number from 1", value)
        for name, low in (("rate", 0.0), ("seconds", 0.0), ("slow_factor", 0.0)):
            if not getattr(self, name) > low:
                raise ArgumentError(name, "a number above 0", getattr(self, name))
        for name in ("warm_s", "round_trip_us", "event_loop_us"):
            if not getattr(self, name) >= 0:
                raise ArgumentError(name, "a number from 0", getattr(self, name))
        if not 0 <= self.slow_share <= 1:
            raise ArgumentError("slow_share", "a share in 0..1", self.slow_share)
        if self.policy not in POLICIES:
            raise ArgumentError("policy", f"one of {', '.join(POLICIES)}", self.policy)
        for name in ("candidates", "tiers"):
            shares = getattr(self, name)
            if any(not share > 0 for share in shares.values()) or any(
                not isinstance(m, int) or m < 1 for m in self.candidates
            ):
                raise ArgumentError(name, "shares above 0", dict(shares))
        if not self.candidates:
            raise ArgumentError("candidates", "at least one number of candidates", "none")
        if self.cell_engines * self.cells > self.engines or self.engines % self.cell_engines:
            raise ArgumentError(
                "engines",
                f"whole cells of {self.cell_hosts} hosts with {self.host_engines} engines, at "
                f"least the {self.cells} simulated",
                self.engines,
            )

    @property
    def cell_engines(self) -> int:
        """Engines of a cell."""
        return self.host_engines * self.cell_hosts

    @property
    def sampled(self) -> float:
        """The share of the fleet that is simulated."""
        return self.cells * self.cell_engines / self.engines

    def statement(self) -> str:
        """In one sentence, what of the fleet was simulated."""
        cells = self.engines // self.cell_engines
        whole = (
            f"{self.engines:,} engines in {cells:,} cells of {self.cell_hosts} hosts with "
            f"{self.host_engines} each, {self.rate:,.0f} requests a second"
        )
        if self.cells == cells:
            return f"{whole}: all of it was simulated."
        return (
            f"{whole}: {self.cells} cell{'s were' if self.cells > 1 else ' was'} simulated "
            f"({self.sampled:.1%} of the engines), with {self.sampled:.1%} of the Poisson stream; "
            "the other cells are copies of it in distribution."
        )


class _Shape:
    """Stands for an array: the scheduler reads its shape and bytes, nothing reads its values."""

    __slots__ = ("nbytes", "shape")

    def __init__(self, users: int, candidates: int) -> None:
        self.shape = users, candidates
        self.nbytes = 8 * users * candidates


class _ShapeSignature(ModelSignature):
    """Cuts and joins sizes instead of arrays."""

    def __init__(self) -> None:
        spec = InputSpec((InputField("candidate", ("B", "m")),), {"B": (1, None), "m": (1, None)})
        super().__init__(spec, "m")
        self.separable = True

    def slice_users(self, arrays: Any, start: int, stop: int) -> Any:
        return (_Shape(stop - start, arrays[0].shape[1]),)

    def slice_candidates(self, arrays: Any, start: int, stop: int) -> Any:
        return (_Shape(arrays[0].shape[0], stop - start),)

    def join(self, parts: Any, padded: int) -> Any:
        return (_Shape(sum([p[0].shape[0] for p in parts]), padded),)

    def slice_outputs(self, outputs: Outputs, start: int, users: int, candidates: int) -> Outputs:
        return outputs

    def join_outputs(self, parts: Any) -> Outputs:
        return parts[0][0]


class _Host:
    """A server process: an event loop that takes time for each request, then the scheduler."""

    def __init__(
        self, number: int, fleet: Fleet, config: ServingConfig, profile: EngineProfile,
        clock: VirtualClock, rng: random.Random,
    ) -> None:  # fmt: skip
        self.scheduler = Scheduler("ranker", "1", config, clock, _ShapeSignature())
        self._clock, self._event_loop_s = clock, fleet.event_loop_us / 1e6
        self._free_at = 0.0
        add_engines(
            self.scheduler,
            clock,
            [profile.sampler(rng)] * fleet.host_engines,
            name=f"{number}.",
            line=profile.line,
            compute=False,
        )
        self.peak = 0

    def arrive(self, pending: PendingRequest, arrays: Arrays) -> None:
        """A request comes in from the wire."""
        if not self._event_loop_s:
            self.submit(pending, arrays)
            return
        self._free_at = max(self._free_at, self._clock.now()) + self._event_loop_s
        self._clock.call_at(self._free_at, partial(self.submit, pending, arrays))

    def submit(self, pending: PendingRequest, arrays: Arrays) -> None:
        try:
            self.scheduler.submit(pending, arrays)
        except Rejected:
            pending.done(pending)
        self.peak = max(self.peak, len(self.scheduler.open))

    def load(self) -> LoadReport:
        """The answer to a probe; requests in the event loop are not seen by the scheduler yet."""
        load = self.scheduler.load()
        waiting = max(self._free_at - self._clock.now(), 0.0)
        if not waiting:
            return load
        queued = round(waiting / self._event_loop_s)
        return load._replace(in_flight=load.in_flight + queued, latency_s=load.latency_s + waiting)

    def used_s(self) -> float:
        return sum(slot.used_s for slot in self.scheduler.router.slots)


class Outcome:
    """Results of a simulated cell, or of several together.

    Attributes:
        offered: requests counted.
        outcomes: "ok" or why not -> requests.
        latency: of those answered, from the caller's sending to its having the answer.
        in_goal: answered within the latency goal.
        utilisation: engines' busy share, one value a host.
        peaks: most requests open at once, one value a host.
        probes: sent.
        tiers: latency by tier.
    """

    def __init__(self) -> None:
        self.offered = self.in_goal = self.probes = self.events = 0
        self.outcomes: dict[str, int] = {}
        self.latency = LatencyHistogram()
        self.tiers: dict[str, LatencyHistogram] = {}
        self.utilisation: list[float] = []
        self.peaks: list[int] = []

    @classmethod
    def joined(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """Of several cells together."""
        whole = cls()
        for one in outcomes:
            whole.offered += one.offered
            whole.in_goal += one.in_goal
            whole.probes += one.probes
            whole.events += one.events
            whole.utilisation += one.utilisation
            whole.peaks += one.peaks
            whole.latency.merge(one.latency)
            for outcome, count in one.outcomes.items():
                whole.outcomes[outcome] = whole.outcomes.get(outcome, 0) + count
            for tier, histogram in one.tiers.items():
                whole.tiers.setdefault(tier, LatencyHistogram()).merge(histogram)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        latency = self.latency
        used = np.array(self.utilisation)
        return {
            "offered": self.offered,
            "answered_share": latency.count / max(self.offered, 1),
            "in_goal_share": self.in_goal / max(self.offered, 1),
            "outcomes": dict(self.outcomes),
            "latency_ms": _percentiles(latency),
            "tiers_ms": {tier: _percentiles(h) for tier, h in self.tiers.items()},
            "utilisation": {
                "mean": float(used.mean()),
                "least": float(used.min()),
                "most": float(used.max()),
            },
            "most_open_on_a_host": max(self.peaks),
            "probes": self.probes,
            "events": self.events,
        }


def _percentiles(histogram: LatencyHistogram) -> dict[str, float] | None:
    if not histogram.count:
        return None
    return {f"p{q:g}": histogram.percentile_ms(q) for q in (1, 10, 25, 50, 75, 90, 95, 99, 99.9)}


class _Cell:
    """The hosts and callers of one cell."""

    def __init__(
        self, fleet: Fleet, config: ServingConfig, profile: EngineProfile, seed: int
    ) -> None:
        self.fleet, self.config = fleet, config
        self.rng = random.Random(f"{fleet.seed}/{seed}")
        self.numpy = np.random.default_rng([fleet.seed, seed])
        self.clock = clock = VirtualClock()
        slow = round(fleet.slow_share * fleet.cell_hosts)
        self.hosts = [
            _Host(i, fleet, config, profile.scaled(fleet.slow_factor) if i < slow else profile,
                  clock, self.rng)
            for i in range(fleet.cell_hosts)
        ]  # fmt: skip
        self.pools = [
            ProbePool(self.hosts, fleet.probing, random.Random(self.rng.random()))
            for _ in range(fleet.callers)
        ]
        self.turns = [self.rng.randrange(fleet.cell_hosts) for _ in range(fleet.callers)]
        self.out = Outcome()
        self.half_s = fleet.round_trip_us / 2e6
        self.end = fleet.warm_s + fleet.seconds
        self._goals = {tier: config.latency_s(tier) for tier in config.tiers}
        self._arrays = {m: (_Shape(1, m),) for m in fleet.candidates}
        self._requests = {
            tier: Request("ranker", "", {}, tier=tier)
            for tier in fleet.tiers or {config.default_tier: 1.0}
        }
        self._draws = self._stream()

    def _stream(self) -> Any:
        """(time, caller, candidates, tier) of one request after another."""
        fleet = self.fleet
        rate = fleet.rate * fleet.cell_engines / fleet.engines
        sizes, size_shares = _shares(fleet.candidates)
        tiers, tier_shares = _shares(fleet.tiers or {self.config.default_tier: 1.0})
        now = 0.0
        while True:
            times = now + np.cumsum(self.numpy.exponential(1 / rate, _CHUNK))
            now = float(times[-1])
            yield from zip(
                times.tolist(),
                self.numpy.integers(0, fleet.callers, _CHUNK).tolist(),
                [sizes[i] for i in self.numpy.choice(len(sizes), _CHUNK, p=size_shares)],
                [tiers[i] for i in self.numpy.choice(len(tiers), _CHUNK, p=tier_shares)],
                strict=True,
            )

    def run(self, report: Callable[[float], None]) -> Outcome:
        """Run the cell; ``report`` is called with the share done."""
        clock, steps = self.clock, 50
        self._next()
        for step in range(steps):
            until = self.end * (step + 1) / steps
            self.out.events += clock.run(until)
            if until >= self.fleet.warm_s and not self.out.utilisation:
                # Engines' busy time before counting began.
                self.out.utilisation = [-host.used_s() for host in self.hosts]
                counted_from = until
            report((step + 1) / steps)
        self.out.utilisation = [
            (before + host.used_s()) / (self.end - counted_from) / self.fleet.host_engines
            for before, host in zip(self.out.utilisation, self.hosts, strict=True)
        ]
        self.out.events += clock.run(self.end + 10.0)
        self.out.peaks = [host.peak for host in self.hosts]
        return self.out

    def _next(self) -> None:
        when, caller, candidates, tier = next(self._draws)
        if when < self.end:
            self.clock.call_at(when, partial(self._send, caller, candidates, tier))

    def _send(self, caller: int, candidates: int, tier: str) -> None:
        now = self.clock.now()
        host = self._choose(caller, now)
        arrays: Any = self._arrays[candidates]
        pending = PendingRequest(self._requests[tier], arrays, partial(self._done, now, tier))
        self.clock.call_at(now + self.half_s, partial(host.arrive, pending, arrays))
        self._next()

    def _choose(self, caller: int, now: float) -> _Host:
        policy = self.fleet.policy
        if policy == "random":
            return self.rng.choice(self.hosts)
        if policy == "round_robin":
            self.turns[caller] = turn = (self.turns[caller] + 1) % len(self.hosts)
            return self.hosts[turn]
        if policy == "least":
            return min(self.hosts, key=lambda host: host.load().in_flight)
        pool = self.pools[caller]
        for probed in pool.targets():
            self.out.probes += 1
            self.clock.call_at(now + self.half_s, partial(self._probed, pool, probed))
        return pool.pick(now)

    def _probed(self, pool: ProbePool[_Host], host: _Host) -> None:
        load = host.load()
        there = self.clock.now() + self.half_s
        _, in_flight, latency_s, each_s = load
        self.clock.call_at(there, partial(pool.add, host, in_flight, latency_s, there, each_s))

    def _done(self, sent: float, tier: str, pending: PendingRequest) -> None:
        if sent < self.fleet.warm_s:
            return
        out = self.out
        out.offered += 1
        error = pending.error
        outcome = "ok" if error is None else error.kind.value
        out.outcomes[outcome] = out.outcomes.get(outcome, 0) + 1
        if error is not None:
            return
        seconds = self.clock.now() + self.half_s - sent
        ns = round(seconds * 1e9)
        out.latency.add(ns)
        found = out.tiers.get(tier)
        if found is None:
            found = out.tiers[tier] = LatencyHistogram()
        found.add(ns)
        out.in_goal += seconds <= self._goals[tier]


def _shares(mix: Mapping[Any, float]) -> tuple[list[Any], np.ndarray]:
    shares = np.array(list(mix.values()), float)
    return list(mix), shares / shares.sum()


def simulate(
    fleet: Fleet,
    profile: EngineProfile,
    config: ServingConfig | None = None,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Outcome]:
    """Run a fleet's simulated cells, one after another.

    Args:
        config: of every host's scheduler; its pool is not used.
        progress: called with the share done.

    Returns:
        what each cell did.

    Raises:
        ArgumentError: a tier of the traffic that the configuration has not.
    """
    config = config or ServingConfig()
    for tier in fleet.tiers:
        if tier not in config.tiers:
            raise ArgumentError("tiers", f"tiers among {sorted(config.tiers)}", tier)
    outcomes = []
    for i in range(fleet.cells):
        cell = _Cell(fleet, config, profile, i)
        outcomes.append(cell.run(lambda share, i=i: progress((i + share) / fleet.cells)))  # type: ignore[misc]
    return outcomes

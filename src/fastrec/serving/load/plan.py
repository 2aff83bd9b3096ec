"""The requests of a load test, drawn in advance: times, tiers, tenants, sizes. Read from JSON.

Send times do not depend on earlier answers (open loop). Latencies count from the time a request
was due, so a server that falls behind shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastrec.errors import ConfigError
from fastrec.serving.core.config_parsing import ParsedConfig, check

ARRIVALS = ("poisson", "bursts", "uniform")
_RATIO = 1.25


@dataclass(frozen=True)
class Stage:
    """``rate`` requests a second for ``seconds``, moving evenly to ``to`` where that is given."""

    seconds: float
    rate: float
    to: float | None = None

    def __post_init__(self) -> None:
        check("stage.seconds", self.seconds, 0, above=True)
        check("stage.rate", self.rate, 0)
        if self.to is not None:
            check("stage.to", self.to, 0)


@dataclass(frozen=True)
class Bursts:
    """A Poisson process that is ``factor`` times its mean for ``share`` of the time, in bursts of
    ``length_s`` on average, and as much below it between them (a Markov-modulated process)."""

    factor: float = 4.0
    share: float = 0.1
    length_s: float = 0.5

    def __post_init__(self) -> None:
        check("bursts.share", self.share, 0, 0.9, above=True)
        check("bursts.factor", self.factor, 1, 1 / self.share)
        check("bursts.length_s", self.length_s, 0, above=True)


@dataclass(frozen=True)
class Mix:
    """One tier's part of the traffic.

    Args:
        tier: as the server calls it; "" = its default.
        share: against the other tiers' shares.
        tenants: how many; 0 = none is named.
        skew: a tenant's share falls with its rank to this power (Zipf); 0 = all alike.
        priority: 1 is the highest, 0 = not said.
        timeout_ms: sent with each request, and how long the client waits; None = the server's goal.
    """

    tier: str = ""
    share: float = 1.0
    tenants: int = 0
    skew: float = 0.0
    priority: int = 0
    timeout_ms: float | None = None

    def __post_init__(self) -> None:
        check("mix.share", self.share, 0, above=True)
        check("mix.tenants", self.tenants, 0)
        check("mix.skew", self.skew, 0)
        check("mix.priority", self.priority, 0)
        if self.timeout_ms is not None:
            check("mix.timeout_ms", self.timeout_ms, 0, above=True)


@dataclass(frozen=True)
class RequestSizes:
    """How large requests are.

    Args:
        users: of each request.
        candidates: of each; with a ``tail``, of the smallest ones.
        tail: None, or the exponent of a Pareto distribution (the smaller, the heavier), cut at
            ``most``. Sizes are then rounded up to a ladder of steps of a quarter.
        most: candidates of the largest.
    """

    users: int = 1
    candidates: int = 50
    tail: float | None = None
    most: int = 1000

    def __post_init__(self) -> None:
        check("sizes.users", self.users, 1)
        check("sizes.candidates", self.candidates, 1)
        check("sizes.most", self.most, self.candidates)
        if self.tail is not None:
            check("sizes.tail", self.tail, 0, above=True)

    def ladder(self) -> tuple[int, ...]:
        """The candidate counts that occur, rising."""
        if self.tail is None:
            return (self.candidates,)
        steps = [self.candidates]
        while steps[-1] < self.most:
            steps.append(min(max(math.ceil(steps[-1] * _RATIO), steps[-1] + 1), self.most))
        return tuple(steps)


@dataclass(frozen=True)
class Retry:
    """How clients retry when they are refused.

    Args:
        tries: in all; 1 = they give up at once.
        backoff_ms: before the second try; a random part of it is waited (full jitter).
        factor: by which it grows with each try.
        obey: whether they follow the server's advice to wait or to give up.
    """

    tries: int = 1
    backoff_ms: float = 20.0
    factor: float = 2.0
    obey: bool = True

    def __post_init__(self) -> None:
        check("retry.tries", self.tries, 1)
        check("retry.backoff_ms", self.backoff_ms, 0)
        check("retry.factor", self.factor, 1)


@dataclass(frozen=True)
class LoadPlan(ParsedConfig):
    """A whole test. ``slo_ms``: answers within it are good; ``patience_s``: how long the last
    answers are waited for."""

    stages: tuple[Stage, ...] = (Stage(10.0, 100.0),)
    arrivals: str = "poisson"
    bursts: Bursts = Bursts()
    mix: tuple[Mix, ...] = (Mix(),)
    sizes: RequestSizes = RequestSizes()
    retry: Retry = Retry()
    slo_ms: float = 50.0
    patience_s: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise ConfigError(f"arrivals: expected one of {ARRIVALS}, got {self.arrivals!r}")
        for name in ("stages", "mix"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one, got none")
        tiers = [m.tier for m in self.mix]
        if len(set(tiers)) < len(tiers):
            raise ConfigError(f"mix: expected every tier once, got {tiers}")
        check("slo_ms", self.slo_ms, 0, above=True)
        check("patience_s", self.patience_s, 0)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True)
class Schedule:
    """Every request of a plan, in order of time; arrays of one element a request.

    Args:
        at_s: when it is meant to be sent, seconds from the start, float64.
        stage, mix, size: indices into the plan's stages, its mix and its ladder of sizes.
        tenant: number within its tier, -1 where none is named.
        variant: which of the prepared requests of its size is sent, 0..2^16-1.
    """

    at_s: np.ndarray
    stage: np.ndarray
    mix: np.ndarray
    size: np.ndarray
    tenant: np.ndarray
    variant: np.ndarray

    def __len__(self) -> int:
        return len(self.at_s)


def draw(plan: LoadPlan) -> Schedule:
    """The plan's requests, the same for the same plan."""
    rng = np.random.default_rng(plan.seed)
    at = _arrivals(plan, rng)
    count = len(at)
    ends = np.cumsum([stage.seconds for stage in plan.stages])
    stage = np.minimum(np.searchsorted(ends, at, side="right"), len(ends) - 1)
    shares = np.array([m.share for m in plan.mix])
    mix = rng.choice(len(shares), count, p=shares / shares.sum())
    tenant = np.full(count, -1)
    for i, m in enumerate(plan.mix):
        if m.tenants:
            weights = np.arange(1, m.tenants + 1, dtype=float) ** -m.skew
            mine = np.flatnonzero(mix == i)
            tenant[mine] = rng.choice(m.tenants, len(mine), p=weights / weights.sum())
    ladder = plan.sizes.ladder()
    size = np.zeros(count, np.int64)
    if plan.sizes.tail is not None:
        drawn = plan.sizes.candidates * (1 - rng.random(count)) ** (-1 / plan.sizes.tail)
        size = np.minimum(np.searchsorted(ladder, drawn), len(ladder) - 1)
    return Schedule(at, stage, mix, size, tenant, rng.integers(0, 1 << 16, count))


def _arrivals(plan: LoadPlan, rng: np.random.Generator) -> np.ndarray:
    starts = np.concatenate([[0.0], np.cumsum([s.seconds for s in plan.stages])])
    low = np.array([s.rate for s in plan.stages])
    high = np.array([s.rate if s.to is None else s.to for s in plan.stages])
    if plan.arrivals == "uniform":
        means = np.array([s.seconds for s in plan.stages]) * (low + high) / 2
        grid = np.linspace(0, 1, 1001)
        # Expected arrivals up to each point of each stage, and the times at which they are whole.
        inside = low[:, None] * grid + (high - low)[:, None] * grid**2 / 2
        lengths = np.array([s.seconds for s in plan.stages])[:, None]
        before = np.concatenate([[0.0], np.cumsum(means)[:-1]])[:, None]
        expected = (before + inside * lengths).ravel()
        times = (starts[:-1, None] + grid * lengths).ravel()
        return np.interp(np.arange(int(means.sum())) + 0.5, expected, times)
    quiet, factor = 1.0, 1.0
    switches = np.empty(0)
    if plan.arrivals == "bursts":
        b = plan.bursts
        factor, quiet = b.factor, (1 - b.share * b.factor) / (1 - b.share)
        # Times at which the process changes between quiet and burst, quiet first.
        pairs = int(3 * starts[-1] * b.share / b.length_s) + 20
        lengths = rng.exponential([b.length_s * (1 - b.share) / b.share, b.length_s], (pairs, 2))
        switches = np.cumsum(lengths.ravel())
    # Thinning: candidates at the highest rate, each kept with its moment's share of that.
    top = max(low.max(), high.max()) * factor
    at = np.sort(rng.uniform(0, starts[-1], rng.poisson(top * starts[-1])))
    stage = np.minimum(np.searchsorted(starts, at, side="right") - 1, len(low) - 1)
    inside = (at - starts[stage]) / (starts[stage + 1] - starts[stage])
    rate = low[stage] + (high - low)[stage] * inside
    rate *= np.where(np.searchsorted(switches, at) % 2, factor, quiet)
    kept: np.ndarray = at[rng.random(len(at)) * top < rate]
    return kept

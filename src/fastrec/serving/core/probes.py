"""Which of several hosts gets a request: Prequal's rule (Wydrowski et al., NSDI 2024, section 4).

Probes are asked for beside requests and used later: a pool of the last answers says how many
requests each host held and how long a new one would take there. Hosts whose requests in flight lie
above a quantile of what was lately seen are hot. Among cold ones the least latency wins; where all
are hot, the fewest requests in flight ("hot-cold lexicographic").

A request counts at once in the pool's entry of its host, an answer is used a few times only, and
some are thrown away with each request, the worst and the oldest in turn: so old news and many
requests upon the same news do no harm.
"""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastrec.errors import ConfigError
from fastrec.serving.core.config_parsing import check

Host = TypeVar("Host", bound=Hashable)
_SEEN = 128


@dataclass(frozen=True)
class Probing:
    """How hosts are probed; the paper's values.

    Args:
        per_request: probes sent with each request, on average (power of d choices).
        pool: answers kept.
        max_age_s: older answers are not used.
        hot_quantile: of requests in flight lately seen; hosts above it are hot. 0 = fewest
            requests in flight decides alone, 1 = latency alone.
        removed: answers thrown away with each request, on average.
        delta: how much the pool may shrink or grow on its own; it sets how often an answer is used.
        timeout_s: a probe that takes longer says nothing.
    """

    per_request: float = 3.0
    pool: int = 16
    max_age_s: float = 1.0
    hot_quantile: float = 0.84
    removed: float = 1.0
    delta: float = 1.0
    timeout_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("per_request", "removed", "delta"):
            check(f"probing.{name}", getattr(self, name), 0)
        for name in ("max_age_s", "timeout_s"):
            check(f"probing.{name}", getattr(self, name), 0, above=True)
        check("probing.hot_quantile", self.hot_quantile, 0, 1)
        check("probing.pool", self.pool, 2)

    def uses(self, hosts: int) -> float:
        """How often an answer may be used (the paper's b_reuse)."""
        kept = (1 - min(self.pool, hosts - 1) / hosts) * self.per_request - self.removed
        if kept <= 0:
            # Answers leave as fast as they come: they are used until they are too old.
            return float("inf")
        return max(1.0, (1 + self.delta) / kept)


class _ProbeResult(Generic[Host]):
    __slots__ = ("at", "each_s", "host", "in_flight", "latency_s", "used")

    def __init__(
        self, host: Host, in_flight: float, latency_s: float, each_s: float, at: float
    ) -> None:
        self.host, self.at = host, at
        self.in_flight, self.latency_s, self.each_s = in_flight, latency_s, each_s
        self.used = 0


class ProbePool(Generic[Host]):
    """The answers of one caller's probes. No clock, no sockets.

    Args:
        hosts: that may be probed; :meth:`set_hosts` changes them.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        probing: Probing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.probing = probing or Probing()
        self._rng = rng or random.Random()
        self._answers: list[_ProbeResult[Host]] = []
        self._seen: deque[float] = deque(maxlen=_SEEN)
        self._sorted: list[float] = []
        self._owed_probes = self._owed_removals = 0.0
        self._worst_next = True
        self.set_hosts(hosts)

    def set_hosts(self, hosts: Sequence[Host]) -> None:
        """The hosts from now on; answers of others are forgotten."""
        if not hosts:
            raise ConfigError("hosts: expected at least one, got none")
        self.hosts = list(hosts)
        self._uses = self.probing.uses(len(self.hosts)) if len(self.hosts) > 1 else float("inf")
        known = set(self.hosts)
        self._answers = [a for a in self._answers if a.host in known]

    def targets(self) -> list[Host]:
        """Hosts to probe beside the next request: some, at random, none twice."""
        self._owed_probes += self.probing.per_request
        count = min(int(self._owed_probes), len(self.hosts))
        self._owed_probes -= int(self._owed_probes)
        # random.sample takes longer than all else that a request costs its caller.
        chosen: list[Host] = []
        hosts, draw = self.hosts, self._rng.random
        while len(chosen) < count:
            host = hosts[int(draw() * len(hosts))]
            if host not in chosen:
                chosen.append(host)
        return chosen

    def add(
        self, host: Host, in_flight: float, latency_s: float, now: float, each_s: float = 0.0
    ) -> None:
        """Keep a probe's answer.

        Args:
            host: that was asked.
            in_flight: requests it holds.
            latency_s: seconds that a new one would take.
            now: the caller's clock.
            each_s: the delay that one more request adds.
        """
        if len(self._seen) == _SEEN:
            self._sorted.pop(bisect_right(self._sorted, self._seen[0]) - 1)
        self._seen.append(in_flight)
        insort(self._sorted, in_flight)
        self._answers = [a for a in self._answers if a.host != host]
        if len(self._answers) >= self.probing.pool:
            self._answers.pop(0)
        self._answers.append(_ProbeResult(host, in_flight, latency_s, each_s, now))

    def fresh(self, now: float) -> bool:
        """Whether there are answers to choose by."""
        oldest = now - self.probing.max_age_s
        usable = sum(a.at >= oldest and a.used < self._uses for a in self._answers)
        return usable >= min(2, len(self.hosts))

    def drop(self, host: Host) -> None:
        """A host does not answer: what it last said is not used any more."""
        self._answers = [a for a in self._answers if a.host != host]

    def pick(self, now: float, usable: Callable[[Host], bool] = lambda host: True) -> Host:
        """The host of the next request; at random where fewer than two answers are fresh."""
        oldest = now - self.probing.max_age_s
        self._answers = [a for a in self._answers if a.at >= oldest and a.used < self._uses]
        choice = [a for a in self._answers if usable(a.host)]
        if len(choice) < min(2, len(self.hosts)):
            hosts = [h for h in self.hosts if usable(h)] or self.hosts
            return self._rng.choice(hosts)
        hot = self._hot_from()
        best = min(choice, key=lambda a: self._rank(a, hot))
        best.used += 1
        best.in_flight += 1
        best.latency_s += best.each_s
        host = best.host
        self._remove_some(hot)
        return host

    def _hot_from(self) -> float:
        """Requests in flight from which on a host is hot."""
        quantile = self.probing.hot_quantile
        if quantile >= 1 or not self._sorted:
            return float("inf")
        return self._sorted[int(quantile * (len(self._sorted) - 1))] if quantile else -1.0

    @staticmethod
    def _rank(answer: _ProbeResult[Host], hot: float) -> tuple[int, float, float]:
        if answer.in_flight > hot:
            return 1, answer.in_flight, answer.latency_s
        return 0, answer.latency_s, answer.in_flight

    def _remove_some(self, hot: float) -> None:
        self._owed_removals += self.probing.removed
        while self._owed_removals >= 1:
            self._owed_removals -= 1
            if len(self._answers) > 2:
                worst = max(self._answers, key=lambda a: self._rank(a, hot))
                self._answers.remove(worst if self._worst_next else self._answers[0])
            self._worst_next = not self._worst_next

    def __len__(self) -> int:
        return len(self._answers)

"""Who is let in: quotas (GCRA) and the limit of work in flight (Gradient2 with soft partitions)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from fastrec.serving.core.config import Admission, ServingConfig


class Gcra:
    """The generic cell rate algorithm: a bucket that is one number a key, in whole nanoseconds.

    Args:
        rate: units a second.
        burst: units that may be saved up.
        most: keys remembered; the longest unseen is forgotten first (it then has a full bucket).
    """

    def __init__(self, rate: float, burst: float, most: int = 1) -> None:
        self.ns_per_unit = 1e9 / rate
        self.burst_ns = int(burst * self.ns_per_unit)
        self.most = most
        self._full_at: OrderedDict[Hashable, int] = OrderedDict()

    def wait_s(self, key: Hashable, units: float, now: float) -> float:
        """0 where ``units`` may be spent, else the seconds until they may; spends nothing.

        More than a whole bucket may be spent from a full one: large requests are not refused for
        ever, they are paid for afterwards.
        """
        now_ns = int(now * 1e9)
        full_at = max(self._full_at.get(key, now_ns), now_ns)
        cost = min(int(units * self.ns_per_unit), self.burst_ns)
        return max(full_at + cost - self.burst_ns - now_ns, 0) / 1e9

    def spend(self, key: Hashable, units: float, now: float) -> None:
        """Take ``units`` out."""
        now_ns = int(now * 1e9)
        full_at = max(self._full_at.pop(key, now_ns), now_ns)
        self._full_at[key] = full_at + int(units * self.ns_per_unit)
        while len(self._full_at) > self.most:
            self._full_at.popitem(last=False)

    def __len__(self) -> int:
        return len(self._full_at)


class Limit:
    """Engine seconds in flight per slot: Netflix's Gradient2 on service times.

    A sample is a call's time over what the engine took when it was warmed, so neither batching nor
    the size of requests looks like overload. The limit shrinks when the last window's mean is
    beyond ``tolerance`` times the usual one, and grows while most of it is in use.
    """

    def __init__(self, config: Admission, goal_s: float, batch_s: float) -> None:
        self.config = config
        self.batch_s = batch_s
        low, high = config.min_limit_ms, config.max_limit_ms
        self.high_s = max(goal_s - batch_s, batch_s) if high is None else high / 1e3
        self.low_s = min(2 * batch_s, self.high_s) if low is None else low / 1e3
        self.limit_s = self.high_s
        self.long = 0.0
        self._sum, self._count = 0.0, 0

    def sample(self, slowdown: float, in_flight_s: float) -> bool:
        """One call; ``in_flight_s`` per slot. Whether the limit was stepped."""
        long = self.config.long_window
        if self.long == 0.0:
            self.long = slowdown
        self.long += (slowdown - self.long) / long
        self._sum += slowdown
        self._count += 1
        if self._count < self.config.window:
            return False
        short = self._sum / self._count
        self._sum, self._count = 0.0, 0
        if self.long > 2 * short:
            # Netflix's: after a long slow phase the usual time has to find back quickly.
            self.long *= 0.95
        if not self.config.adaptive:
            return False
        gradient = min(max(self.config.tolerance * self.long / max(short, 1e-9), 0.5), 1.0)
        if gradient == 1.0 and in_flight_s < self.limit_s / 2:
            return False
        wanted = self.limit_s * gradient + self.batch_s
        stepped = self.limit_s + self.config.smoothing * (wanted - self.limit_s)
        self.limit_s = min(max(stepped, self.low_s), self.high_s)
        return True


def quotas_of(config: ServingConfig) -> dict[str, Gcra]:
    """A bucket a tenant for each tier that has a quota."""
    return {
        name: Gcra(tier.quota.engine_us_per_s, tier.quota.burst_us, tier.max_tenants)
        for name, tier in config.tiers.items()
        if tier.quota is not None
    }

"""``Budget``: limits on a model's latency and size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fastrec.errors import ArgumentError


@dataclass(frozen=True)
class Budget:
    """Limits on latency and size; at least one of them.

    Args:
        latency_ms: of one call of the native engine: the median of the quietest of some rounds.
        size_mb: of what ``fastrec.save`` writes, in 10^6 bytes.
        batch: users a call.
        threads: threads a call may use; None means all CPUs of this process.

    Raises:
        ArgumentError: no limit, or one that is not positive.
    """

    latency_ms: float | None = None
    size_mb: float | None = None
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.latency_ms is None and self.size_mb is None:
            raise ArgumentError("budget", "latency_ms, size_mb or both", "neither")
        for name in ("latency_ms", "size_mb"):
            limit = getattr(self, name)
            number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if limit is not None and not (number and 0 < limit < math.inf):
                raise ArgumentError(name, "a positive number or None", repr(limit))
        for name in ("batch", "threads"):
            count = getattr(self, name)
            if name == "threads" and count is None:
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ArgumentError(name, "a positive integer", repr(count))

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        both = {"latency_ms": self.latency_ms, "size_mb": self.size_mb}
        return {name: limit for name, limit in both.items() if limit is not None}

    def use(self, cost: Any) -> float:
        """The largest share of a limit that a cost (with ``latency_ms`` and ``size_mb``) takes: at
        most 1 where it is kept."""
        return max(getattr(cost, name) / limit for name, limit in self.limits.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

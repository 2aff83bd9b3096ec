"""Call times of a process that lives long: counts in buckets, however many calls there are."""

from __future__ import annotations

from array import array

import numpy as np

from fastrec.errors import ArgumentError

# A power of two is cut into 64 buckets: a percentile is off by half a bucket, 0.8 %, at most.
_BITS = 6
_PARTS = 1 << _BITS


class LatencyHistogram:
    """Durations in nanoseconds, in 30 KB; one thread adds."""

    def __init__(self) -> None:
        # Durations below _PARTS are exact; an int64 has 63 bits.
        self._counts = array("q", bytes(8 * (63 - _BITS + 1) * _PARTS))
        self.count = 0
        self.worst_ns = 0

    def add(self, ns: int) -> None:
        """Count one duration (0 or more, below 2**63)."""
        shift = ns.bit_length() - _BITS - 1
        if shift <= 0:
            self._counts[ns] += 1
        else:
            # ns >> shift lies in _PARTS .. 2 * _PARTS - 1.
            self._counts[shift * _PARTS + (ns >> shift)] += 1
        self.count += 1
        if ns > self.worst_ns:
            self.worst_ns = ns

    def merge(self, other: LatencyHistogram) -> None:
        """Count what another one has counted too."""
        total = np.frombuffer(self._counts, np.int64) + np.frombuffer(other._counts, np.int64)
        self._counts = array("q", total.tobytes())
        self.count += other.count
        self.worst_ns = max(self.worst_ns, other.worst_ns)

    def percentile_ms(self, q: float) -> float:
        """The smallest bucket that ``q`` percent of the calls do not exceed: its middle, in ms.

        Raises:
            ArgumentError: nothing was counted, or ``q`` is not in 0..100.
        """
        if not 0 <= q <= 100:
            raise ArgumentError("q", "0..100", q)
        if not self.count:
            raise ArgumentError("q", "a histogram that has counted something", "an empty one")
        reached = np.cumsum(self._counts)
        bucket = int(np.searchsorted(reached, max(1.0, q / 100 * self.count)))
        if bucket < 2 * _PARTS:
            return bucket / 1e6
        shift = bucket // _PARTS - 1
        low = (bucket - shift * _PARTS) << shift
        return min(low + ((1 << shift) - 1) / 2, self.worst_ns) / 1e6

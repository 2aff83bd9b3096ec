"""The machine's limits (peak operations, bandwidth), measured in the same run: about 0.1 s each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastrec.kernels._compiled import native

# Working sets that fit each cache level on common machines, for the roofline plot.
LEVELS = {"L1": 16 << 10, "L2": 512 << 10, "L3": 6 << 20, "memory": 256 << 20}
PEAKS = {
    "fp32": lambda seconds: native().fma_peak_gflops(seconds),
    "bf16": lambda seconds: native().bf16_peak_gflops(seconds),
    "int8": lambda seconds: native().vpdpbusd_peak_gops(seconds),
}


@dataclass
class Ceilings:
    """Measured limits of ``threads`` cores working at the same time.

    Attributes:
        peaks: precision -> 10^9 operations a second on registers alone, the best seen so far.
        levels: cache level -> 10^9 bytes a second read.
    """

    threads: int
    seconds: float = 0.1
    peaks: dict[str, float] = field(init=False)
    levels: dict[str, float] = field(init=False)
    _rates: dict[int, float] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.peaks = {name: self._together(PEAKS[name]) for name in PEAKS}
        self.levels = {name: self.bandwidth(size) for name, size in LEVELS.items()}

    def peak(self, precision: str) -> float:
        """The peak now, for a share of the same minute; 0 where the CPU lacks the instruction."""
        now = self._together(PEAKS[precision])
        self.peaks[precision] = max(now, self.peaks[precision])
        return now

    def bandwidth(self, total_bytes: int) -> float:
        """10^9 bytes a second read from a working set of this size, an equal part a core."""
        part = max(4096, total_bytes // self.threads)
        return self._together(lambda seconds: native().read_bandwidth_gbs(part, seconds))

    def reading(self, total_bytes: int) -> float:
        """As :meth:`bandwidth`, of the power of two below, and measured once: the rate that a
        working set of this size can't exceed by much."""
        size = 1 << max(total_bytes, 4096 * self.threads).bit_length() - 1
        if size not in self._rates:
            self._rates[size] = self.bandwidth(size)
        return self._rates[size]

    def _together(self, measure: Callable[[float], float]) -> float:
        if self.threads == 1:
            return float(measure(self.seconds))
        with ThreadPoolExecutor(self.threads) as pool:
            return float(sum(pool.map(measure, [self.seconds] * self.threads)))

"""The system's own state: CPU time taken away by the cgroup, memory, the event loop's lag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.config import Admission

_CGROUP = Path("/sys/fs/cgroup")


class Signals(NamedTuple):
    """A probe's readings: microseconds throttled so far, and the used share of the memory limit."""

    throttled_us: int
    memory: float


def cgroup_probe(root: Path = _CGROUP) -> Callable[[], Signals]:
    """Reads cgroup v2's files of this process; zeros where there are none (no limit is set)."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        own = ""
    folder = root / own if (root / own / "cpu.stat").is_file() else root

    def read() -> Signals:
        throttled, memory = 0, 0.0
        try:
            for line in (folder / "cpu.stat").read_text().splitlines():
                if line.startswith("throttled_usec"):
                    throttled = int(line.split()[1])
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                memory = int((folder / "memory.current").read_text()) / max(int(limit), 1)
        except (OSError, ValueError):
            pass
        return Signals(throttled, memory)

    return read


class Guard:
    """A factor on the concurrency limit, between 0.25 and 1, with hysteresis.

    Each look halves it (down to a quarter) while any signal is above its high mark, and gives a
    tenth back while all are below their low ones.
    """

    def __init__(
        self, config: Admission, clock: Clock, probe: Callable[[], Signals] | None = None
    ) -> None:
        self.factor = 1.0
        self.reason = ""
        self.lag_s = 0.0
        self.throttled = 0.0
        self.memory = 0.0
        self._config, self._clock = config, clock
        self._probe = probe or cgroup_probe()
        self._period = config.guard_period_ms / 1e3
        self._last = self._probe()
        self._due = clock.now() + self._period
        self._timer: Timer = clock.call_at(self._due, self._look)

    def _look(self) -> None:
        now = self._clock.now()
        # The timer's own lateness is how long the loop was busy with something else.
        self.lag_s = max(now - self._due, 0.0)
        signals = self._probe()
        elapsed = max(now - self._due + self._period, 1e-9)
        self.throttled = (signals.throttled_us - self._last.throttled_us) / 1e6 / elapsed
        self.memory = signals.memory
        self._last = signals
        c = self._config
        marks = (
            ("throttled", self.throttled, c.throttled_low, c.throttled_high),
            ("memory", self.memory, c.memory_low, c.memory_high),
            ("loop lag", self.lag_s * 1e3, c.lag_low_ms, c.lag_high_ms),
        )
        above = [name for name, value, _, high in marks if value > high]
        if above:
            self.factor = max(self.factor / 2, 0.25)
            self.reason = ", ".join(above)
        elif all(value <= low for _, value, low, _ in marks):
            self.factor = min(self.factor + 0.1, 1.0)
            if self.factor == 1.0:
                self.reason = ""
        self._due = now + self._period
        self._timer = self._clock.call_at(self._due, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

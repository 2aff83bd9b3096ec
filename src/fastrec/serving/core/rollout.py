"""Grey release: a new version takes a growing share of the traffic, and loses it at the first
window in which it fails more often, or is slower, than the old one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.config import Canary


@dataclass
class Window:
    """Answers of one version in a window: seconds of good ones, and the number of failures."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def count(self) -> int:
        """Answers and failures."""
        return len(self.seconds) + self.failed

    def quantile(self, q: float) -> float:
        """Of the seconds."""
        values = sorted(self.seconds)
        return values[min(int(q * len(values)), len(values) - 1)]


class Rollout:
    """One release under way.

    Args:
        set_weight: gives the new version a share, and the old one the rest.
        ended: called with "promote" or "rollback", and the reason.
    """

    def __init__(
        self,
        config: Canary,
        clock: Clock,
        set_weight: Callable[[float, str], None],
        ended: Callable[[str, str], None],
    ) -> None:
        self.config, self._clock = config, clock
        self._set_weight, self._ended = set_weight, ended
        self.old, self.new = Window(), Window()
        self.step, self.windows, self._good = 0, 0, 0
        self.done = False
        self._set_weight(config.steps[0], "start")
        self._timer: Timer = clock.call_at(clock.now() + config.window_s, self._judge)

    def add(self, new: bool, seconds: float, failed: bool) -> None:
        """A request has ended (refused ones do not count)."""
        window = self.new if new else self.old
        if failed:
            window.failed += 1
            # A version that fails outright is not kept until the window ends.
            if new and window.failed >= self.config.min_requests and not self.done:
                self._judge()
        else:
            window.seconds.append(seconds)

    def cancel(self, reason: str) -> None:
        """Take the new version back now."""
        if not self.done:
            self._end("rollback", reason)

    def verdict(self) -> str:
        """ "" where the window shows no fault."""
        old, new = self.old, self.new
        failing = new.failed / max(new.count, 1) - old.failed / max(old.count, 1)
        if failing > self.config.max_error_rate:
            share = new.failed / new.count
            return f"{share:.1%} of {new.count} requests failed ({failing:+.1%} to the old version)"
        if len(new.seconds) < self.config.min_requests or len(old.seconds) < 10:
            return ""
        for name, q in (("p50", 0.5), ("p99", 0.99)):
            if name == "p99" and min(len(new.seconds), len(old.seconds)) < 100:
                continue
            before, after = old.quantile(q), new.quantile(q)
            if after > before * self.config.max_slowdown:
                return f"{name} {after * 1e3:.3g} ms, {before * 1e3:.3g} in the old version"
        return ""

    def _judge(self) -> None:
        self._timer.cancel()
        if self.done:
            return
        enough = self.new.count >= self.config.min_requests
        # A window with too few answers for a verdict is extended.
        self.windows += enough
        fault = self.verdict() if enough else ""
        if fault:
            self._end("rollback", fault)
            return
        if enough:
            self._good += 1
            self.old, self.new = Window(), Window()
        if self._good >= self.config.good_windows:
            self._good = 0
            if self.config.steps[self.step] >= 1.0:
                self._end("promote", f"{self.windows} windows without a fault")
                return
            self.step += 1
            self._set_weight(self.config.steps[self.step], "step")
        self._timer = self._clock.call_at(self._clock.now() + self.config.window_s, self._judge)

    def _end(self, action: str, reason: str) -> None:
        self.done = True
        self._timer.cancel()
        self._ended(action, reason)

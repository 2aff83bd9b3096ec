"""Which engine runs a batch: the one that is expected to be done first, among the healthy."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from fastrec.serving.core.batcher import Batch
from fastrec.serving.core.clock import Clock, Timer
from fastrec.serving.core.config import Pool
from fastrec.serving.core.engines import EngineHandle
from fastrec.serving.core.latency import LatencyModel
from fastrec.serving.core.queues import Queues, SubRequest

# Calls before an engine's speed is compared with its peers'.
_JUDGED_AFTER = 20


class Slot:
    """An engine that takes requests.

    Attributes:
        model: its latency, learnt; ``reference`` as it was when the engine was warm.
        slowdown: its calls' times over what the peers' model predicts, averaged.
    """

    def __init__(self, handle: EngineHandle, model: LatencyModel) -> None:
        self.handle = handle
        self.model, self.reference = model, model.copy()
        self.batch: Batch | None = None
        self.busy_until = 0.0
        self.errors = 0
        self.slowdown = 1.0
        self.calls = 0
        self.ejections = 0
        self.ejected_until = 0.0
        self.used_s = 0.0
        self.watch: Timer | None = None


class Router:
    """The engines of one model version."""

    def __init__(
        self, config: Pool, clock: Clock, deep: Callable[[int], int] = lambda candidates: candidates
    ) -> None:
        # Candidates -> candidates scored in full.
        self.deep = deep
        self.config, self._clock = config, clock
        self.slots: list[Slot] = []
        self.out: list[Slot] = []
        # Learnt from all engines together; admission uses it.
        self.model = LatencyModel()
        self._idle: list[Slot] = []

    def add(self, handle: EngineHandle, model: LatencyModel | None = None) -> Slot:
        """A new engine."""
        return self.put(Slot(handle, (model or self.model).copy()))

    def put(self, slot: Slot) -> Slot:
        """An engine comes (back) in."""
        self.slots.append(slot)
        if slot.batch is None:
            self._idle.append(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        """An engine takes no more; its call may still be running."""
        for group in (self.slots, self._idle, self.out):
            if slot in group:
                group.remove(slot)

    def idle(self) -> list[Slot]:
        """Engines with nothing to do."""
        return self._idle

    def running_s(self, now: float) -> float:
        """Seconds of work left in the calls that run, all engines together."""
        return sum([max(s.busy_until - now, 0.0) for s in self.slots if s.batch is not None])

    def fastest(self, idle: list[Slot], avoid: Slot | None = None) -> Slot:
        """The idle engine that is done first with a request, another than ``avoid`` if there is."""
        if len(idle) == 1:
            return idle[0]
        choice = [s for s in idle if s is not avoid]
        return min(choice, key=lambda s: (s.model.predict(1, 50), s.used_s))

    def pick(
        self, idle: list[Slot], seed: SubRequest, queues: Queues, gain: float, now: float
    ) -> Slot | None:
        """The engine for the batch that ``seed`` begins; None = wait for a busy one.

        Waiting is better where a busy engine would be done earlier than every idle one, and too
        little is queued to use both.

        Args:
            idle: engines to choose from.
            seed: the batch's first sub-request.
            queues: what else waits.
            gain: engine time over the summed costs of what shares calls.
            now: seconds on the scheduler's clock.
        """
        best = self.fastest(idle, seed.avoid)
        if len(self.slots) == len(idle):
            return best
        users, rows = seed.users, seed.users * self.deep(seed.key[0])
        mine = best.model.predict(users, rows)
        soonest, speed = float("inf"), 0.0
        for slot in self.slots:
            if slot.batch is None:
                continue
            own = slot.model.predict(users, rows)
            soonest = min(soonest, max(slot.busy_until - now, 0.0) + own)
            speed += mine / max(own, 1e-9)
        # The queue keeps the busy ones longer than the slow one would need.
        if soonest < mine * 0.8 and queues.tiers and mine > 0:
            queued = queues.queued_s() * gain
            if queued < soonest * max(speed, 1.0):
                return None
        return best

    def start(self, slot: Slot, batch: Batch, stalled: Callable[[Slot, Batch], None]) -> None:
        """The engine begins a call, and is watched."""
        slot.batch = batch
        slot.busy_until = batch.started + batch.predicted_s
        self._idle.remove(slot)
        if slot.watch is None:
            self._watch(slot, stalled)

    def _watch(self, slot: Slot, stalled: Callable[[Slot, Batch], None]) -> None:
        """One timer for each engine: it checks the call that runs when it fires."""
        batch = slot.batch
        assert batch is not None
        patience = max(
            self.config.stall_factor * batch.predicted_s, self.config.stall_floor_ms / 1e3
        )

        def look() -> None:
            slot.watch = None
            running = slot.batch
            if running is None or running.given_up:
                return
            if running is batch:
                stalled(slot, running)
            else:
                self._watch(slot, stalled)

        slot.watch = self._clock.call_at(batch.started + patience, look)

    def end(self, slot: Slot, batch: Batch, now: float) -> None:
        """The call is over."""
        slot.batch = None
        slot.used_s += now - batch.started
        if slot in self.slots:
            self._idle.append(slot)

    def observe(self, slot: Slot, batch: Batch, seconds: float, now: float) -> bool:
        """Learn from a call that succeeded.

        Args:
            slot: the engine.
            batch: what it ran.
            seconds: the call's time.
            now: seconds on the scheduler's clock.

        Returns:
            whether the engine was taken out for being slower than the others.
        """
        users, rows = batch.users, batch.rows
        slot.errors = 0
        slot.calls += 1
        ratio = seconds / max(self.model.predict(users, rows), 1e-9)
        slot.slowdown += 0.1 * (min(ratio, 100.0) - slot.slowdown)
        slot.model.observe(users, rows, seconds)
        self.model.observe(users, rows, seconds)
        if slot.calls < _JUDGED_AFTER or len(self.slots) < 3:
            return False
        if slot.slowdown < self.config.eject_slowdown or slot not in self.slots:
            return False
        usual = statistics.median([s.slowdown for s in self.slots])
        if slot.slowdown < self.config.eject_slowdown * usual:
            return False
        if len(self.out) + 1 > self.config.max_ejected * (len(self.slots) + len(self.out)):
            return False
        self._eject(slot, now)
        return True

    def failed(self, slot: Slot) -> bool:
        """A call raised. Whether its engine is out now."""
        slot.errors += 1
        if slot.errors < self.config.eject_errors or len(self.slots) < 2:
            return False
        self._eject(slot, self._clock.now())
        return True

    def _eject(self, slot: Slot, now: float) -> None:
        self.remove(slot)
        self.out.append(slot)
        slot.ejections += 1
        slot.ejected_until = now + self.config.eject_ms / 1e3 * slot.ejections

        def back() -> None:
            if slot in self.out:
                self.out.remove(slot)
                slot.errors, slot.calls, slot.slowdown = 0, 0, 1.0
                self.put(slot)

        self._clock.call_at(slot.ejected_until, back)

    def snapshot(self, now: float) -> list[dict[str, Any]]:
        """Each engine in plain JSON types."""
        return [
            {
                "name": s.handle.name,
                "busy": s.batch is not None,
                "ejected": s in self.out,
                "slowdown": s.slowdown,
                "used_s": s.used_s,
                "errors": s.errors,
            }
            for s in (*self.slots, *self.out)
        ]

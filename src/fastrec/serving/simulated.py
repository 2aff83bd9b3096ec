"""An engine on a virtual clock: the scheduler's tests and the simulator run the real core on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastrec.serving.core.clock import VirtualClock
from fastrec.serving.core.engines import Done, EngineDied, EngineHandle, Ran
from fastrec.serving.core.latency import LatencyModel
from fastrec.serving.core.router import Slot
from fastrec.serving.core.scheduler import Scheduler
from fastrec.serving.core.signature import ModelSignature
from fastrec.spec import InputField, InputSpec

SPEC = InputSpec(
    (InputField("user", ("B", 1)), InputField("candidate", ("B", "m"))),
    {"B": (1, None), "m": (1, None)},
)

# users, rows -> seconds
Cost = Callable[[int, int], float]


def signature() -> ModelSignature:
    """Of a ranker that scores each candidate apart."""
    made = ModelSignature(SPEC, "m")
    made.examine(lambda arrays: {"scores": arrays[0] * 1000 + arrays[1]})
    return made


class SimulatedEngine(EngineHandle):
    """Takes virtual time for each call; can be made to fail, die and hang.

    Args:
        name: unique.
        clock: whose time passes.
        cost: users, rows -> seconds of a call.
        compute: whether scores are computed.
    """

    def __init__(self, name: str, clock: VirtualClock, cost: Cost, *, compute: bool = True) -> None:
        super().__init__(name)
        self.spec = SPEC
        self.clock, self.cost, self.compute = clock, cost, compute
        self.dead = self.hangs = False
        self.fails: Callable[[Sequence[np.ndarray]], bool] = lambda arrays: False
        self.calls = 0
        self.busy = False
        self._done: Done | None = None

    async def open(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Nothing to free."""

    def run(self, arrays: Sequence[np.ndarray], done: Done) -> None:
        assert not self.busy, "one call at a time"
        self.busy, self._done = True, done
        self.calls += 1
        users, candidates = arrays[-1].shape
        seconds = self.cost(users, users * candidates)
        if self.dead:
            self.clock.call_at(self.clock.now(), self._died)
        elif not self.hangs:
            self.clock.call_at(self.clock.now() + seconds, lambda: self._answer(arrays, seconds))

    def die(self) -> None:
        """As a killed process: a call under way ends at once."""
        self.dead = True
        if self.busy:
            self.clock.call_at(self.clock.now(), self._died)

    def _died(self) -> None:
        if self.busy:
            self._end(Ran({}, 0.0, EngineDied(f"{self.name} died")))

    def _answer(self, arrays: Sequence[np.ndarray], seconds: float) -> None:
        if self.dead or not self.busy:
            return
        if self.fails(arrays):
            self._end(Ran({}, seconds, ValueError("made to fail")))
            return
        # Large simulations count requests; the scores are of no use to them.
        scores = arrays[0] * 1000 + arrays[1] if self.compute else arrays[-1]
        self._end(Ran({"scores": scores}, seconds))

    def _end(self, ran: Ran) -> None:
        done, self.busy, self._done = self._done, False, None
        assert done is not None
        done(ran)


def add_engines(
    scheduler: Scheduler,
    clock: VirtualClock,
    costs: Sequence[Cost],
    *,
    name: str = "engine",
    line: Cost | None = None,
    **options: Any,
) -> list[SimulatedEngine]:
    """Add engines whose latency models know the truth, as after warming.

    Args:
        scheduler: that takes them.
        clock: its clock.
        costs: of each engine, see :class:`SimulatedEngine`.
        name: prefix of their names.
        line: the usual cost, where ``costs`` scatter about it.
        options: of :class:`SimulatedEngine`.
    """
    made = []
    for i, cost in enumerate(costs):
        engine = SimulatedEngine(f"{name}{i}", clock, cost, **options)
        model = LatencyModel()
        known = line or cost
        for users in (1, 2, 4, 8):
            for candidates in (10, 50):
                seconds = known(users, users * candidates)
                model.observe(users, users * candidates, seconds, seed=True)
        scheduler.router.model = model.copy()
        scheduler.add_engine(engine, Slot(engine, model))
        made.append(engine)
    return made

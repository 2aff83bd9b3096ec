"""The engines of a model version: COLD -> LOADING -> WARMING -> READY -> DRAINING -> CLOSED.

An engine is READY once every shape bucket has run on it. Spares are READY engines that take no
requests until another one fails; lost engines are restarted in the background.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastrec.errors import ServingError
from fastrec.serving.core.clock import Clock
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.engines import (
    EngineDied,
    EngineHandle,
    InlineEngine,
    Ran,
    Source,
    ThreadEngine,
)
from fastrec.serving.core.events import EngineChanged, Event
from fastrec.serving.core.latency import LatencyModel
from fastrec.serving.core.process import ProcessEngine
from fastrec.serving.core.router import Slot
from fastrec.serving.core.scheduler import Scheduler
from fastrec.serving.core.screened import screened_source
from fastrec.serving.core.signature import Arrays, ModelSignature, Outputs
from fastrec.serving.core.tasks import keep

_LOG = logging.getLogger("fastrec.serving")
_KINDS: dict[str, Callable[[str, Source, int | None], EngineHandle]] = {
    "thread": ThreadEngine,
    "process": ProcessEngine,
    "inline": InlineEngine,
}
_numbers = itertools.count()


class EngineState(str, enum.Enum):
    """Of an engine."""

    COLD = "COLD"
    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    CLOSED = "CLOSED"


@dataclass(eq=False)
class Instance:
    """One engine and its state; ``slot`` once it has taken requests."""

    handle: EngineHandle
    state: EngineState = EngineState.COLD
    slot: Slot | None = None
    model: LatencyModel = field(default_factory=LatencyModel)


class EnginePool:
    """Makes, warms, replaces and ends the engines of one model version.

    Args:
        name, version: of the model.
        source: see :func:`fastrec.serving.core.engines.open_source`.
        config: of the server.
        clock: the core's.
        emit: receives the engines' events.
        make_scheduler: called once, with the signature that the first engine shows.
        engines, kind: instead of the configured ones.

    Attributes:
        scheduler: of the version; there once the first engine is warm.
    """

    def __init__(
        self,
        name: str,
        version: str,
        source: Source,
        config: ServingConfig,
        clock: Clock,
        emit: Callable[[Event], None],
        make_scheduler: Callable[[ModelSignature], Scheduler],
        *,
        engines: int | None = None,
        kind: str | None = None,
    ) -> None:
        self.name, self.version = name, version
        self.source, self._scored = screened_source(source, config.screening, config.pool.threads)
        self.config, self.clock, self._emit = config, clock, emit
        self.wanted = config.pool.engines if engines is None else engines
        self.kind = config.pool.kind if kind is None else kind
        self._make_scheduler = make_scheduler
        self.instances: list[Instance] = []
        self.signature: ModelSignature | None = None
        self.scheduler: Scheduler | None = None
        self.draining = False
        self.failures = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # --- starting

    async def start(self) -> None:
        """All engines and spares, the first one first.

        Raises:
            FastrecError: an engine cannot be loaded or warmed; the others are closed.
        """
        try:
            await self._launch()
            rest = self.wanted + self.config.pool.spares - 1
            await asyncio.gather(*(self._launch() for _ in range(rest)))
        except BaseException:
            await self.close()
            raise

    async def _launch(self) -> None:
        handle = _KINDS[self.kind](
            f"{self.name}:{self.version}#{next(_numbers)}", self.source, self.config.pool.threads
        )
        instance = Instance(handle)
        self.instances.append(instance)
        limit = self.config.pool.start_timeout_s
        try:
            await asyncio.wait_for(self._prepare(instance), limit)
        except BaseException as error:
            handle.kill()
            self._change(instance, EngineState.CLOSED, f"{type(error).__name__}: {error}")
            self.instances.remove(instance)
            if isinstance(error, asyncio.TimeoutError):
                raise ServingError(f"{handle.name} was not ready after {limit:g} s") from error
            raise
        self._change(instance, EngineState.READY, "every shape bucket has run")
        handle.on_death = partial(self._found_dead, instance)
        if self.draining:
            await self._end(instance, "the pool is closing")
        else:
            self._fill()

    async def _prepare(self, instance: Instance) -> None:
        self._change(instance, EngineState.LOADING, "")
        await instance.handle.open()
        self._change(instance, EngineState.WARMING, "")
        if self.signature is None:
            signature = ModelSignature(
                instance.handle.spec, self.config.batching.candidate_symbol, self._scored
            )
            await _examine(signature, instance.handle)
            self.signature = signature
        await self._warm(instance, self.signature)

    async def _warm(self, instance: Instance, signature: ModelSignature) -> None:
        """Run every bucket; what they take is what the latency model begins with."""
        cap_s = self._cap_s()
        for candidates in self._candidate_buckets(signature):
            for users in self._user_buckets(signature):
                arrays = signature.sample(users, candidates)
                size = signature.size(arrays)
                best = float("inf")
                for _ in range(self.config.pool.warm_calls):
                    ran = await _ran(instance.handle, arrays)
                    if ran.error is not None:
                        raise ran.error
                    best = min(best, ran.seconds)
                rows = size[0] * signature.deep(size[1])
                for _ in range(8):
                    instance.model.observe(size[0], rows, best, seed=True)
                if best > 2 * cap_s and not self.config.pool.warm_users:
                    # Larger ones are never put into a call.
                    break

    def _cap_s(self) -> float:
        goal = min(self.config.latency_s(tier) for tier in self.config.tiers)
        cap = self.config.batching.max_batch_ms
        return goal / 4 if cap is None else cap / 1e3

    def _user_buckets(self, signature: ModelSignature) -> list[int]:
        if self.config.pool.warm_users:
            return list(self.config.pool.warm_users)
        low = signature.spec.limits.get("B", (1, None))[0]
        if not signature.joins or not self.config.batching.enabled:
            return [low]
        most = self.config.batching.max_users or 64
        most = min(most, signature.most("B") or most)
        return [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if low <= n <= most] or [low]

    def _candidate_buckets(self, signature: ModelSignature) -> Sequence[int | None]:
        symbol = self.config.batching.candidate_symbol
        if not any(symbol in f.dims for f in signature.spec.fields):
            return [None]
        sizes = self.config.pool.warm_candidates or self.config.batching.pad_to
        if sizes:
            return list(sizes)
        low, high = signature.spec.limits.get(symbol, (1, None))
        usual = min(max(50, low), high or 50)
        # A second size separates the cost of candidates from that of users.
        return sorted({usual, max(usual // 4, low)})

    # --- running

    def _fill(self) -> None:
        """Put spares in until as many engines as wanted take requests."""
        if self.draining:
            return
        if self.scheduler is None:
            assert self.signature is not None
            self.scheduler = self._make_scheduler(self.signature)
            self.scheduler.router.model = self.instances[0].model.copy()
        taking = sum(i.slot is not None and i.state is EngineState.READY for i in self.instances)
        for instance in self.instances:
            if taking >= self.wanted:
                break
            if instance.state is EngineState.READY and instance.slot is None:
                instance.slot = Slot(instance.handle, instance.model)
                self.scheduler.add_engine(instance.handle, instance.slot)
                taking += 1

    def lost(self, slot: Slot, reason: str) -> None:
        """The scheduler has taken an engine out: a spare replaces it, and it is restarted; one that
        was only slow or failing returns after a while."""
        instance = next((i for i in self.instances if i.slot is slot), None)
        if instance is None:
            return
        if reason in ("slow", "failing"):
            self._tell(instance, EngineState.READY.value, "EJECTED", reason)
        else:
            self._gone(instance, reason)

    def _found_dead(self, instance: Instance) -> None:
        """Between two calls."""
        if instance not in self.instances:
            return
        if instance.slot is not None and self.scheduler is not None:
            self.scheduler.found_dead(instance.slot)
        else:
            self._gone(instance, "died")

    def _gone(self, instance: Instance, reason: str) -> None:
        self._change(instance, EngineState.CLOSED, reason)
        self.instances.remove(instance)
        self.failures += 1
        instance.handle.kill()
        self._fill()
        if not self.draining:
            keep(self._tasks, self._replace(instance))

    async def _replace(self, lost: Instance) -> None:
        # A thread that hangs cannot be ended: it is left alone, and closes when it answers.
        keep(self._tasks, lost.handle.close())
        pause = 0.0
        while not self.draining:
            try:
                await self._launch()
                return
            except Exception as error:
                pause = min(max(2 * pause, 0.1), 30.0)
                _LOG.warning("%s:%s cannot be restarted: %s", self.name, self.version, error)
                await asyncio.sleep(pause)

    # --- ending

    async def drain(self) -> None:
        """Answer what was accepted, then close."""
        self.draining = True
        while self.scheduler is not None and self.scheduler.open:
            await asyncio.sleep(0.002)
        await self.close()

    async def close(self) -> None:
        """End the engines. Closing twice is harmless."""
        self.draining = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(self._end(i, "closed") for i in list(self.instances)))

    async def _end(self, instance: Instance, reason: str) -> None:
        if instance not in self.instances:
            return
        self._change(instance, EngineState.DRAINING, reason)
        self.instances.remove(instance)
        if instance.slot is not None and self.scheduler is not None:
            self.scheduler.remove_engine(instance.slot)
        await instance.handle.close()
        self._change(instance, EngineState.CLOSED, reason)

    def states(self) -> dict[str, int]:
        """How many engines are in which state."""
        return dict(Counter(i.state.value for i in self.instances))

    def _change(self, instance: Instance, state: EngineState, reason: str) -> None:
        old, instance.state = instance.state, state
        self._tell(instance, old.value, state.value, reason)

    def _tell(self, instance: Instance, old: str, new: str, reason: str) -> None:
        name = instance.handle.name
        self._emit(EngineChanged(self.clock.now(), self.name, self.version, name, old, new, reason))


async def _ran(handle: EngineHandle, arrays: Arrays) -> Ran:
    future: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()

    def done(ran: Ran) -> None:
        if not future.done():
            future.set_result(ran)

    handle.run(arrays, done)
    return await future


async def _examine(signature: ModelSignature, handle: EngineHandle) -> None:
    """``ModelSignature.examine`` on an engine that answers later: one call after another."""
    loop = asyncio.get_running_loop()

    def call(arrays: Arrays) -> Outputs:
        ran = asyncio.run_coroutine_threadsafe(_ran(handle, arrays), loop).result()
        if ran.error is not None:
            raise ran.error
        return ran.outputs

    try:
        await asyncio.to_thread(signature.examine, call)
    except EngineDied as error:
        raise ServingError(f"{handle.name} died on its first call") from error

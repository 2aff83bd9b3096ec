"""The runtime that a server, a test or a notebook calls: models in, answers out."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, FastrecError
from fastrec.runtime.spec import InputSpec
from fastrec.serving.core.clock import Clock, LoopClock
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.engines import EngineHandle, InlineEngine, Ran, Source, ThreadEngine
from fastrec.serving.core.events import BatchDone, EngineChanged, Event, Observer, RequestDone
from fastrec.serving.core.request import Kind, Rejected, Request, Response, Timings

_LOG = logging.getLogger("fastrec.serving")


@dataclass(frozen=True)
class ModelInfo:
    """A version of a model.

    Args:
        name, version: what requests call it.
        state: the pool's: LOADING, WARMING, READY, DRAINING or FAILED.
        weight: its share of requests that name no version.
        spec: inputs, in order, with their limits.
        outputs: name -> (dims, numpy dtype), dims as in ``spec``; known once it is READY.
        max_users: users that one call takes, larger requests are split.
        engines: engines by state.
    """

    name: str
    version: str
    state: str
    weight: float
    spec: InputSpec
    outputs: dict[str, tuple[tuple[int | str, ...], str]]
    max_users: int
    engines: dict[str, int]


@dataclass
class _Version:
    info: ModelInfo
    handle: EngineHandle
    waiting: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


class Runtime:
    """Schedules requests over engines.

    Everything but the engines runs in the thread of one event loop, in which it must be made.

    Args:
        config: see :class:`ServingConfig`; its defaults where None.
        clock: the loop's where None.
    """

    def __init__(self, config: ServingConfig | None = None, *, clock: Clock | None = None) -> None:
        self.config = config or ServingConfig()
        self.clock = clock or LoopClock()
        self._observers: list[Observer] = []
        self._models: dict[str, dict[str, _Version]] = {}
        self._names = itertools.count()
        self._running = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer.on_event`` from now on; the result ends that."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    async def load(
        self,
        model: str,
        source: Source,
        *,
        version: str = "1",
        weight: float | None = None,
        engines: int | None = None,
        kind: str | None = None,
    ) -> ModelInfo:
        """Load a version, warm it, and let it take requests; returns once it is READY.

        Args:
            model: its name.
            source: a path that ``load_engine`` reads, an :class:`EntryPoint`, or a factory.
            version: must be new.
            weight: its share of the requests that name no version, against the other versions'
                weights; None = all of it for the first version, 0 for others.
            engines, kind: instead of the configured ones.

        Raises:
            ArgumentError: the version is there already.
            FastrecError: it cannot be loaded or warmed; nothing of it is left.
        """
        versions = self._models.setdefault(model, {})
        if version in versions:
            raise ArgumentError("version", "a new one", version)
        name = f"{model}:{version}#{next(self._names)}"
        kind = kind or self.config.pool.kind
        make = InlineEngine if kind == "inline" else ThreadEngine
        handle: EngineHandle = make(name, source, self.config.pool.threads)
        await handle.open()
        share = (0.0 if versions else 1.0) if weight is None else weight
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Ran] = loop.create_future()
        handle.run(handle.spec.sample(), future.set_result)
        ran = await future
        if ran.error is not None:
            await handle.close()
            raise ran.error
        outputs: dict[str, tuple[tuple[int | str, ...], str]] = {
            key: (("B", *value.shape[1:]), str(value.dtype)) for key, value in ran.outputs.items()
        }
        info = ModelInfo(model, version, "READY", share, handle.spec, outputs, 64, {"READY": 1})
        versions[version] = _Version(info, handle)
        self._emit(EngineChanged(self.clock.now(), model, version, name, "WARMING", "READY", ""))
        return info

    async def unload(self, model: str, version: str = "") -> None:
        """Take no more requests, answer those accepted, free the engines.

        Args:
            version: "" = all.

        Raises:
            Rejected: NOT_FOUND.
        """
        self._find(model, version)
        versions = self._models[model]
        for key in [version] if version else list(versions):
            await versions.pop(key).handle.close()
        if not versions:
            del self._models[model]

    async def infer(self, request: Request) -> Response:
        """The answer to one request. Cancelling the task takes the request out at once.

        Raises:
            Rejected: not answered, and why.
        """
        start = self.clock.now()
        if self._draining:
            raise Rejected(Kind.NOT_READY, "the server is shutting down")
        version = self._find(request.model, request.version)
        try:
            arrays = [request.inputs[key] for key in version.handle.spec.names]
            version.handle.spec.check(arrays)
        except KeyError as error:
            raise Rejected(Kind.INVALID, f"input {error} is missing") from error
        except FastrecError as error:
            raise Rejected(Kind.INVALID, str(error)) from error
        future: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()

        def done(ran: Ran) -> None:
            if not future.done():
                future.set_result(ran)

        self._running += 1
        self._idle.clear()
        try:
            version.handle.run(arrays, done)
            ran = await future
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
        total = self.clock.now() - start
        rows = request.rows or int(np.prod(arrays[-1].shape[:2]))
        self._emit(
            RequestDone(
                self.clock.now(),
                request.model,
                version.info.version,
                request.tier or self.config.default_tier,
                "standard",
                request.priority,
                "ok" if ran.error is None else "internal",
                rows,
                total - ran.seconds,
                ran.seconds,
                total,
                request.id,
            )
        )
        self._emit(
            BatchDone(
                self.clock.now(),
                request.model,
                version.info.version,
                version.handle.name,
                "standard",
                1,
                rows,
                ran.seconds,
                ran.seconds,
                "" if ran.error is None else str(ran.error),
            )
        )
        if ran.error is not None:
            raise Rejected(Kind.INTERNAL, str(ran.error)) from ran.error
        times = Timings(total - ran.seconds, ran.seconds, total, rows, engine=version.handle.name)
        return Response(ran.outputs, request.model, version.info.version, times)

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether requests of the model ("" = of every model, and there is one) can run."""
        if self._draining:
            return False
        if not model:
            return bool(self._models)
        versions = self._models.get(model, {})
        return version in versions if version else bool(versions)

    def models(self) -> list[ModelInfo]:
        """Every version, loading ones too."""
        return [v.info for versions in self._models.values() for v in versions.values()]

    def model(self, model: str, version: str = "") -> ModelInfo:
        """One version; "" = the one with the largest weight.

        Raises:
            Rejected: NOT_FOUND.
        """
        return self._find(model, version).info

    def stats(self) -> dict[str, Any]:
        """A snapshot in plain JSON types."""
        return {"models": {}, "admission": {}, "running": self._running}

    async def drain(self, timeout_s: float = 30.0) -> bool:
        """Take no more requests and wait for those accepted; whether all were answered in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Free the engines; requests still there are CANCELLED. Closing twice is harmless."""
        self._draining = True
        for model in list(self._models):
            await self.unload(model)

    def _find(self, model: str, version: str) -> _Version:
        versions = self._models.get(model)
        if not versions:
            raise Rejected(Kind.NOT_FOUND, f"Request for unknown model: '{model}' is not found")
        if version:
            if version not in versions:
                raise Rejected(
                    Kind.NOT_FOUND,
                    f"Request for unknown model: '{model}' version {version} is not found",
                )
            return versions[version]
        return max(versions.values(), key=lambda v: v.info.weight)

    def _emit(self, event: Event) -> None:
        for observer in self._observers:
            try:
                observer.on_event(event)
            except Exception:
                _LOG.exception("an observer failed on %s", type(event).__name__)

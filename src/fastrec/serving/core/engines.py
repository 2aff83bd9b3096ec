"""Engines behind one interface: in a thread, in a worker process, in the event loop.

A handle runs one call at a time and answers in the event loop's thread. What it runs is anything
that is called with arrays, in order, and has a ``spec`` (:class:`fastrec.spec.InputSpec`):
what ``load_engine`` returns, or a caller's own.
"""

from __future__ import annotations

import abc
import asyncio
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastrec.errors import DtypeError, ServingError
from fastrec.spec import InputSpec


class EngineDied(ServingError):
    """The engine is gone; nothing is known about the call, which can be run on another one."""


class Callee(Protocol):
    """An engine: callable with arrays, with a spec."""

    @property
    def spec(self) -> InputSpec:
        """The inputs, in order."""

    def __call__(self, *inputs: np.ndarray) -> Any:
        """One array, a tuple of them, or a mapping of names to them."""


@dataclass(frozen=True)
class EntryPoint:
    """A factory that another process can import: ``EntryPoint("package.module:function")``.

    Args:
        name: module and function.
        options: its keyword arguments, plain JSON types.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


Source = str | Path | EntryPoint | Callable[[], Callee]


@dataclass(slots=True)
class Ran:
    """The result of a call: outputs by name or the error, and the engine's own seconds.

    ``recall``: recall of the engine's screen, where this call was audited.
    """

    outputs: dict[str, np.ndarray]
    seconds: float
    error: Exception | None = None
    recall: float | None = None


Done = Callable[[Ran], None]


def open_source(source: Source, threads: int | None) -> Callee:
    """The engine that a source describes; blocks.

    Raises:
        DtypeError: it has no ``spec``, or is no source.
        FastrecError: as ``load_engine`` and the factory raise it.
    """
    if isinstance(source, str | Path):
        from fastrec.runtime.artifact import load_engine

        return load_engine(source, threads=threads)
    if isinstance(source, EntryPoint):
        import importlib

        module, _, function = source.name.partition(":")
        made = getattr(importlib.import_module(module), function)(**source.options)
    elif callable(source):
        made = source()
    else:
        raise DtypeError("source", "a path, an EntryPoint or a factory", type(source).__name__)
    if not callable(made) or not isinstance(getattr(made, "spec", None), InputSpec):
        raise DtypeError("source", "an engine with a spec", type(made).__name__)
    return made


def named(outputs: Any) -> dict[str, np.ndarray]:
    """Outputs by name: one array is ``scores``, a tuple's are ``output_0``, ..."""
    if isinstance(outputs, np.ndarray):
        return {"scores": outputs}
    if isinstance(outputs, Mapping):
        return {str(name): np.asarray(value) for name, value in outputs.items()}
    return {f"output_{i}": np.asarray(value) for i, value in enumerate(outputs)}


def call(engine: Callee, arrays: Sequence[np.ndarray]) -> Ran:
    """One call, timed; what it raises is the result."""
    start = time.perf_counter()
    try:
        outputs = named(engine(*arrays))
    except Exception as error:
        return Ran({}, time.perf_counter() - start, error)
    return Ran(outputs, time.perf_counter() - start, None, getattr(engine, "recall", None))


class EngineHandle(abc.ABC):
    """One engine as the scheduler sees it.

    Attributes:
        name: unique in the process.
        spec: the inputs; after :meth:`open`.
        on_death: called in the loop's thread when the engine is found dead between two calls.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec = InputSpec(())
        self.on_death: Callable[[], None] = lambda: None

    @abc.abstractmethod
    async def open(self) -> None:
        """Load.

        Raises:
            FastrecError: the engine cannot be made.
        """

    @abc.abstractmethod
    def run(self, arrays: Sequence[np.ndarray], done: Done) -> None:
        """Start a call; ``done`` is called once, later, in the event loop's thread. An engine that
        dies gives :class:`EngineDied`."""

    def kill(self) -> bool:
        """End a call that hangs, which then gives :class:`EngineDied`; False where none can."""
        return False

    @abc.abstractmethod
    async def close(self) -> None:
        """Free the engine once its call is over. Closing twice is harmless."""


class InlineEngine(EngineHandle):
    """Runs in the event loop: without a hop between threads, and nothing else runs meanwhile."""

    def __init__(self, name: str, source: Source, threads: int | None = None) -> None:
        super().__init__(name)
        self._source, self._threads = source, threads
        self._engine: Callee | None = None

    async def open(self) -> None:
        self._engine = open_source(self._source, self._threads)
        self.spec = self._engine.spec

    def run(self, arrays: Sequence[np.ndarray], done: Done) -> None:
        assert self._engine is not None
        asyncio.get_running_loop().call_soon(done, call(self._engine, arrays))

    async def close(self) -> None:
        _close(self._engine)
        self._engine = None


class ThreadEngine(EngineHandle):
    """Runs in a thread of its own; engines that release the GIL leave the event loop its core."""

    def __init__(self, name: str, source: Source, threads: int | None = None) -> None:
        super().__init__(name)
        self._source, self._threads = source, threads
        self._calls: queue.SimpleQueue[tuple[Sequence[np.ndarray], Done] | None] = (
            queue.SimpleQueue()
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = asyncio.Event()

    def _make(self) -> Callee:
        return open_source(self._source, self._threads)

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[InputSpec] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._work, args=(opened,), name=f"fastrec-{self.name}", daemon=True
        )
        self._thread.start()
        self.spec = await opened

    def run(self, arrays: Sequence[np.ndarray], done: Done) -> None:
        self._calls.put((arrays, done))

    async def close(self) -> None:
        if self._thread is not None:
            self._calls.put(None)
            await self._closed.wait()
            self._thread = None

    def _work(self, opened: asyncio.Future[InputSpec]) -> None:
        """The thread: makes the engine, runs what is put, frees it."""
        try:
            engine = self._make()
        except BaseException as error:
            self._tell(_fail, opened, error)
            self._tell(self._closed.set)
            return
        self._tell(_give, opened, engine.spec)
        while (item := self._calls.get()) is not None:
            arrays, done = item
            ran = call(engine, arrays)
            self._tell(done, ran)
            del item, arrays, done, ran
        _close(engine)
        self._tell(self._closed.set)

    def _tell(self, what: Callable[..., Any], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            return


def _give(future: asyncio.Future[InputSpec], spec: InputSpec) -> None:
    if not future.done():
        future.set_result(spec)


def _fail(future: asyncio.Future[InputSpec], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _close(engine: Any) -> None:
    close = getattr(engine, "close", None)
    if close is not None:
        close()

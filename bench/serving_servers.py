"""Servers that bench_serving.py puts load on, each in a process of its own:

    python bench/serving_servers.py KIND ENGINE SETTINGS

``ours``: what ``fastrec serve`` runs. ``fifo``: the same engine behind the same wire, the scheduler
replaced by one queue. ``ray``: the same engine in a Ray Serve replica, batched by ``@serve.batch``.
SETTINGS is JSON: ``config`` of the scheduler; for ours, ``release``: seconds after the start at
which a bad version is released, and how it is bad. Prints a JSON line with the port, and one for
each step of the release; ends with its standard input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import fastrec.serving.server as serving
from fastrec.runtime import load_engine
from fastrec.serving.core import (
    EntryPoint,
    InferenceCore,
    Kind,
    Rejected,
    Request,
    Response,
    RolloutChanged,
    ServingConfig,
    Timings,
)


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


class Fifo(InferenceCore):
    """First come, first served, one request a call; nothing is refused."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._started = False

    async def infer(self, request: Request) -> Response:
        pool = self._find(request.model, "").pool
        if not self._started:
            self._started = True
            for instance in pool.instances:
                self._idle.put_nowait(instance.handle)
        assert pool.signature is not None
        arrays = tuple(request.inputs[name] for name in pool.signature.names)
        pool.signature.check(arrays)
        handle = await self._idle.get()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(ran: Any) -> None:
            self._idle.put_nowait(handle)
            if not future.done():  # the client may be gone
                future.set_result(ran)

        handle.run(arrays, done)
        ran = await future
        if ran.error is not None:
            raise Rejected(Kind.INTERNAL, str(ran.error))
        return Response(ran.outputs, request.model, pool.version, Timings())


class Bad:
    """A version that computes everything twice, or fails on some requests."""

    def __init__(self, path: str, fault: str) -> None:
        self._engine = load_engine(path, threads=1)
        self._fault, self._calls = fault, itertools.count(1)
        self._warm = time.monotonic() + 2
        self.spec = self._engine.spec

    def __call__(self, *inputs: np.ndarray) -> Any:
        fails = self._fault == "fails" and next(self._calls) % 20 == 0
        if fails and time.monotonic() > self._warm:
            raise RuntimeError("made to fail")
        if self._fault == "slow":
            self._engine(*inputs)
        return self._engine(*inputs)


def bad(path: str, fault: str) -> Bad:
    """For an ``EntryPoint``."""
    return Bad(path, fault)


async def plain(kind: str, engine: str, settings: dict[str, Any]) -> None:
    """Ours, or the queue in its place."""
    if kind == "fifo":
        serving.InferenceCore = Fifo  # type: ignore[misc]
    server = serving.Server(
        engine,
        ServingConfig.from_dict(settings["config"]),
        serving.ServerOptions(grpc_port=0, http_port=None),
    )
    await server.start()
    tell(port=server.grpc_port)
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    if "release" in settings:
        await release(server, engine, settings["release"])
    await over.wait()
    server.core._draining = True
    await server.core.close()


async def release(server: Any, engine: str, settings: dict[str, Any]) -> None:
    """Release the bad version, and tell what becomes of it."""
    await asyncio.sleep(settings["after_s"])
    start = server.core.clock.now()

    class Steps:
        def on_event(self, event: Any) -> None:
            if isinstance(event, RolloutChanged):
                tell(
                    action=event.action, at_s=event.at - start, weight=event.weight,
                    reason=event.reason, windows=rollout.windows if rollout else 0,
                )  # fmt: skip

    rollout: Any = None
    server.core.subscribe(Steps())
    source = EntryPoint("serving_servers:bad", {"path": engine, "fault": settings["fault"]})
    rollout = await server.core.release(
        Path(engine).stem, source, version="2", engines=1, kind="thread"
    )


def main() -> None:
    kind, engine, text = sys.argv[1:]
    settings = json.loads(text)
    if kind == "ray":
        from serving_ray import serve

        serve(engine, settings)
    else:
        serving.run(plain(kind, engine, settings))


if __name__ == "__main__":
    main()

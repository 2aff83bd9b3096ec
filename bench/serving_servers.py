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
    Kind,
    Rejected,
    Request,
    Response,
    RolloutChanged,
    Runtime,
    ServingConfig,
    Timings,
)
from fastrec.serving.wire.messages import SERVICE, InferRequest, InferResponse
from fastrec.serving.wire.tensors import datatype, tensor_inputs, to_raw


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


class Fifo(Runtime):
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
        serving.Runtime = Fifo  # type: ignore[misc]
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
    server.runtime._draining = True
    await server.runtime.close()


async def release(server: Any, engine: str, settings: dict[str, Any]) -> None:
    """Release the bad version, and tell what becomes of it."""
    await asyncio.sleep(settings["after_s"])
    start = server.runtime.clock.now()

    class Steps:
        def on_event(self, event: Any) -> None:
            if isinstance(event, RolloutChanged):
                tell(
                    action=event.action, at_s=event.at - start, weight=event.weight,
                    reason=event.reason, windows=rollout.windows if rollout else 0,
                )  # fmt: skip

    rollout: Any = None
    server.runtime.subscribe(Steps())
    source = EntryPoint("serving_servers:bad", {"path": engine, "fault": settings["fault"]})
    rollout = await server.runtime.release(
        Path(engine).stem, source, version="2", engines=1, kind="thread"
    )


def ray_serve(engine: str, settings: dict[str, Any]) -> None:
    """@serve.batch with settings["batch"], else Serve's defaults; its gRPC ingress."""
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(
        grpc_options={"port": settings["port"], "grpc_servicer_functions": ["serving_servers:add"]}
    )

    @serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1})
    class Model:
        def __init__(self) -> None:
            self.engine = load_engine(engine, threads=1)
            for users in (1, 2, 4, 8):
                self.engine(*self.engine.spec.sample({"B": users, "m": 50}))

        @serve.batch(**settings["batch"])
        async def scores(self, requests: list[bytes]) -> list[Any]:
            inputs = [tensor_inputs(InferRequest.FromString(data)) for data in requests]
            joined = [np.concatenate([i[name] for i in inputs]) for name in self.engine.spec.names]
            result = await asyncio.to_thread(self.engine, *joined)
            replies = []
            for row in result:
                reply = InferResponse(model_name="ranker")
                reply.outputs.add(
                    name="scores", datatype=datatype(row.dtype), shape=(1, *row.shape)
                )
                reply.raw_output_contents.append(to_raw(row))
                replies.append(_Bytes(bytes(reply.SerializeToString())))
            return replies

        async def ModelInfer(self, request: bytes) -> Any:
            return await self.scores(request)

    serve.run(Model.bind(), name="ranker", route_prefix="/")
    tell(port=settings["port"])
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


class _Bytes:
    """What Serve asks of a reply."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


def add(servicer: Any, server: Any) -> None:
    """For Serve's ``grpc_servicer_functions``."""
    import grpc

    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.ModelInfer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def main() -> None:
    kind, engine, text = sys.argv[1:]
    settings = json.loads(text)
    if kind == "ray":
        # Replicas import this file by its name: functions of __main__ would be pickled.
        import serving_servers

        serving_servers.ray_serve(engine, settings)
    else:
        serving.run(plain(kind, engine, settings))


if __name__ == "__main__":
    main()

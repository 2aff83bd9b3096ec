"""A gRPC server in a thread, before a core whose answers each test sets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fastrec.serving.core.clock import LoopClock
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.inference_core import ModelInfo
from fastrec.serving.core.request import Kind, Rejected, Request, Response
from fastrec.spec import InputField, InputSpec

pytest.importorskip("grpc", reason="fastrec-kernels[serve] is not installed")

from fastrec.serving.wire.auth import Auth
from fastrec.serving.wire.grpc_server import GrpcServer, Limits
from fastrec.serving.wire.request_handler import RequestHandler
from fastrec.serving.wire.tls import Tls

SPEC = InputSpec(
    (
        InputField("item", ("B", "L"), rows=50),
        InputField("length", ("B",), rows="L"),
        InputField("cand_item", ("B", "m"), rows=50),
    ),
    {"B": (1, None), "L": (1, 12), "m": (1, None)},
)


class Recorded:
    """Stands in for the core: keeps what it was asked, answers as the test says."""

    def __init__(self) -> None:
        self.clock, self.config = LoopClock(), ServingConfig()
        self.requests: list[Request] = []
        self.is_ready = True
        self.cancelled = threading.Event()
        self.arrived = threading.Event()
        self.reply: Callable[[Request], Any] = self.scores

    @staticmethod
    def scores(request: Request) -> Response:
        users, candidates = request.inputs["cand_item"].shape
        scores = np.arange(users * candidates, dtype=np.float32).reshape(users, candidates)
        return Response({"scores": scores}, request.model, request.version or "1")

    async def infer(self, request: Request) -> Response:
        self.requests.append(request)
        self.arrived.set()
        try:
            self.model(request.model, request.version)
            SPEC.check([request.inputs[name] for name in SPEC.names])
            reply = self.reply(request)
            return await reply if asyncio.iscoroutine(reply) else reply
        except KeyError as error:
            raise Rejected(Kind.INVALID, f"{error} is missing") from error
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def shedding(self, model: str, version: str) -> None:
        """Never: every request reaches :meth:`infer`."""

    def ready(self, model: str = "", version: str = "") -> bool:
        return self.is_ready

    def models(self) -> list[ModelInfo]:
        outputs = {"scores": (("B", "m"), "float32")}
        return [
            ModelInfo("ranker", version, "READY", weight, SPEC, outputs, 64, {"READY": 1})
            for version, weight in (("1", 0.0), ("2", 1.0))
        ]

    def model(self, model: str, version: str = "") -> ModelInfo:
        for info in reversed(self.models()):
            if info.name == model and version in ("", info.version):
                return info
        raise Rejected(Kind.NOT_FOUND, f"Request for unknown model: '{model}' is not found")


class Repository:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def index(self) -> list[dict[str, str]]:
        return [
            {"name": "ranker", "version": "2", "state": "READY", "reason": ""},
            {"name": "other", "version": "1", "state": "UNAVAILABLE", "reason": "not loaded"},
        ]

    async def load(self, name: str) -> None:
        self.calls.append(("load", name))

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))


def statistics(name: str, version: str) -> list[dict[str, Any]]:
    return [
        {
            "name": "ranker",
            "version": "2",
            "last_inference": 5,
            "inference_count": 7,
            "execution_count": 3,
            "inference_stats": {"success": (7, 9000), "queue": (7, 100)},
        }
    ]


class Served:
    """A server that listens; ``url`` is where."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[GrpcServer] = []

    def run(self, work: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)  # type: ignore[arg-type]

    def start(self, **settings: Any) -> str:
        async def begin() -> GrpcServer:
            self.core, self.repository = Recorded(), Repository()
            handler = {k: settings.pop(k) for k in ("auth", "admin", "max_users") if k in settings}
            self.handler = RequestHandler(
                self.core, self.repository, statistics=statistics, **handler
            )  # type: ignore[arg-type]
            server = GrpcServer(self.handler, "127.0.0.1:0", **settings)
            await server.start()
            return server

        server = self.run(begin())
        self._servers.append(server)
        self.server = server
        return f"127.0.0.1:{server.port}"

    def stop(self) -> None:
        for server in self._servers:
            self.run(server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


__all__ = ["SPEC", "Auth", "Limits", "Served", "Tls"]

"""The embedded server: a core, its models, gRPC and HTTP in one process."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastrec import __version__
from fastrec.errors import ArgumentError, MissingDependencyError
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.events import EngineChanged, Event
from fastrec.serving.core.inference_core import InferenceCore

try:
    from fastrec.serving.observe.metrics import Metrics
    from fastrec.serving.observe.recorder import Recorder
    from fastrec.serving.repository import ModelRepository
    from fastrec.serving.wire.auth import Auth
    from fastrec.serving.wire.grpc_server import GrpcServer, Limits
    from fastrec.serving.wire.http import HttpLimits, HttpServer
    from fastrec.serving.wire.request_handler import RequestHandler
    from fastrec.serving.wire.rest import Rest
    from fastrec.serving.wire.tls import Tls
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] not in (
        "grpc",
        "google",
        "grpc_reflection",
        "h11",
        "prometheus_client",
    ):
        raise
    raise MissingDependencyError(error.name, "serve", "fastrec.serving.server") from error

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from fastrec.serving.observe.traces import Traces

log = logging.getLogger("fastrec.serving")

_LAG_PERIOD_S = 0.25
# An engine's thread waits so long at most for the GIL that the event loop holds. Python's own 5 ms
# are several calls of a small model.
_SWITCH_S = 5e-4
# Longest wait for a part of the server to close; then it is left behind.
_CLOSE_S = 5.0
_T = TypeVar("_T")
PAGE = Path(__file__).parent / "observe" / "page.html"


@dataclass(frozen=True)
class ServerOptions:
    """Where and to whom a server listens.

    Args:
        host: address to listen at; the default is reached from this machine alone.
        grpc_port, http_port: 0 = a free one; None = not served.
        tls: for both ports.
        auth: None = anyone may call, and is believed its tier and tenant.
        admin: whether models may be loaded and unloaded over the wire; None = from loopback
            addresses alone.
        reuse_port: whether several processes share the ports.
        limits: of the gRPC port; messages over HTTP have the same limit.
        drain_s: how long requests in flight are waited for at the end.
        linger_s: how long the server still answers after SIGTERM while probes say NOT_SERVING,
            so that load balancers can look away first.
        cache: where compiled checkpoints are kept.
        tracer_provider: OpenTelemetry's, where requests' spans go; None = no tracing.
    """

    host: str = "127.0.0.1"
    grpc_port: int | None = 8001
    http_port: int | None = 8000
    tls: Tls | None = None
    auth: Auth | None = None
    admin: bool | None = None
    reuse_port: bool = False
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0
    linger_s: float = 0.0
    cache: Path | None = None
    tracer_provider: TracerProvider | None = None

    def __post_init__(self) -> None:
        if self.grpc_port is None and self.http_port is None:
            raise ArgumentError("ports", "at least one of gRPC and HTTP", "neither")
        checked = self.tls is not None and self.tls.client_authority is not None
        if self.auth is not None and self.auth.by_certificate and not checked:
            raise ArgumentError("tls", "a client authority, as auth names certificates", "none")


class Server:
    """Serves what lies at a path.

    Args:
        path: see :mod:`fastrec.serving.repository`; None = no repository: load models through
            :attr:`core`.
        config: of the scheduler.
        options: of the wire.
    """

    def __init__(
        self,
        path: str | Path | None,
        config: ServingConfig | None = None,
        options: ServerOptions | None = None,
    ) -> None:
        self.options = options or ServerOptions()
        self.config = config or ServingConfig()
        self._path = path
        self._tasks: list[asyncio.Task[None]] = []
        self._grpc: GrpcServer | None = None
        self._http: HttpServer | None = None
        self._rest: Rest | None = None
        self.repository: ModelRepository | None = None
        self._begun = False

    @property
    def grpc_port(self) -> int | None:
        """The port that gRPC listens at."""
        return None if self._grpc is None else self._grpc.port

    @property
    def http_port(self) -> int | None:
        """The port that HTTP listens at."""
        return None if self._http is None else self._http.port

    async def start(self) -> None:
        """Listen, then load; probes say NOT_SERVING until every model is warm.

        Raises:
            ArgumentError: an address or a file of the options is no good.
            ArtifactError, FastrecError: a model cannot be loaded.
        """
        options = self.options
        self._begun = True
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(_SWITCH_S, self._switch_s))
        self.core = InferenceCore(self.config)
        self.core.loading = self._path is not None
        self.recorder = Recorder(self.config)
        self.core.subscribe(self.recorder)
        self.repository = (
            None
            if self._path is None
            else ModelRepository(self._path, self.core, cache=options.cache)
        )
        self.handler = RequestHandler(
            self.core,
            self.repository,
            auth=options.auth,
            admin=options.admin,
            statistics=self.recorder.statistics,
            traces=self._traces(),
        )
        self.metrics = Metrics(self.recorder, self.core, self.handler)
        if options.grpc_port is not None:
            self._grpc = GrpcServer(
                self.handler,
                f"{options.host}:{options.grpc_port}",
                tls=options.tls,
                limits=options.limits,
                reuse_port=options.reuse_port,
            )
            self.core.subscribe(_Changes(self._grpc.health.changed))
            await self._grpc.start()
        if options.http_port is not None:
            self._rest = rest = Rest(
                self.handler,
                metrics=self.metrics.exposition,
                status=self.status,
                page=PAGE.read_bytes(),
            )
            self._http = HttpServer(
                rest.handle,
                f"{options.host}:{options.http_port}",
                tls=options.tls,
                limits=HttpLimits(message_mib=options.limits.message_mib),
                reuse_port=options.reuse_port,
            )
            await self._http.start()
        self._tasks.append(asyncio.create_task(self._watch_lag()))
        if self.repository is not None:
            await self.repository.load_all()
        self.core.loading = False
        if self._grpc is not None:
            self._grpc.health.changed()
        # What is alive now lives as long as the process: no collection needs to look at it again.
        gc.collect()
        gc.freeze()

    async def stop(self) -> None:
        """Say NOT_SERVING, answer what was accepted, close. Takes ``linger_s``, ``drain_s`` and a
        few seconds at most."""
        if not self._begun:
            return
        started = not self.core.loading
        self.core.ending = True
        if self._grpc is not None:
            self._grpc.health.close()
        if started and self.options.linger_s:
            await asyncio.sleep(self.options.linger_s)
        if self._http is not None:
            self._http.close_after_answers()
        if not await self.core.drain(self.options.drain_s):
            log.warning("requests were still running after %.0f s", self.options.drain_s)
        for task in self._tasks:
            task.cancel()
        if self._grpc is not None:
            await _within(_CLOSE_S, self._grpc.stop(1.0), "gRPC")
        if self._http is not None:
            await self._http.stop(1.0)
        if self._rest is not None:
            self._rest.close()
        await _within(_CLOSE_S, self.core.close(), "engines")
        if self.repository is not None:
            self.repository.close()
        sys.setswitchinterval(self._switch_s)
        gc.unfreeze()

    async def run(self, on_start: Callable[[Server], None] | None = None) -> None:
        """Start, serve until SIGTERM or SIGINT, stop; a signal also ends a start under way."""
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        starting = asyncio.ensure_future(self.start())
        ended = asyncio.ensure_future(end.wait())
        try:
            await asyncio.wait({starting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                if on_start is not None:
                    on_start(self)
                await ended
        finally:
            ended.cancel()
            starting.cancel()
            await asyncio.wait({starting, ended}, timeout=_CLOSE_S)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await self.stop()

    def _traces(self) -> Traces | None:
        if self.options.tracer_provider is None:
            return None
        from fastrec.serving.observe.traces import Traces

        return Traces(self.options.tracer_provider, self.core)

    def status(self) -> dict[str, Any]:
        """The status page's data, in plain JSON types."""
        return {
            "version": __version__,
            "at": time.time(),
            "ready": self.core.ready(),
            "running": self.handler.running,
            "queued": self.metrics.queued(),
            "limit_s": self.recorder.limit_s,
            "guard": self.recorder.guard,
            "lag_ms": 1e3 * self.metrics.loop_lag_s,
            "models": [
                {
                    "name": info.name,
                    "version": info.version,
                    "state": info.state,
                    "weight": info.weight,
                    "engines": info.engines,
                }
                for info in self.core.models()
            ],
            "window": self.recorder.window(),
            "series": self.recorder.series(),
            "recent": list(self.recorder.recent),
        }

    async def _watch_lag(self) -> None:
        """How late the loop runs its timers: what every request waits besides its own work."""
        while True:
            due = time.monotonic() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self.metrics.loop_lag_s = max(0.0, time.monotonic() - due)


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run``, on uvloop where that is installed: a request then costs less."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    result: _T = uvloop.run(work)
    return result


async def _within(seconds: float, work: Coroutine[Any, Any, None], name: str) -> None:
    """Wait for ``work``, but no longer than ``seconds``."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if done:
        await task
    else:
        task.cancel()
        log.warning("%s did not close within %.0f s", name, seconds)


class _Changes:
    """Calls back when an engine changes state."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_event(self, event: Event) -> None:
        if isinstance(event, EngineChanged):
            self._call()

"""One replica: a core, its models, and the protocol's calls as methods that Ray Serve finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.inference_core import InferenceCore
from fastrec.serving.core.request import Request
from fastrec.serving.observe.recorder import Recorder
from fastrec.serving.ray.load_meter import LoadMeter
from fastrec.serving.ray.routing import place
from fastrec.serving.repository import ModelRepository
from fastrec.serving.wire.auth import Auth
from fastrec.serving.wire.inference_service import Aborted, InferenceService
from fastrec.serving.wire.request_handler import RequestHandler

# Loading and unloading are the deployment's to do, for all replicas at once.
CALLS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "ModelInfer",
)


class Replica:
    """The class that Ray Serve deploys; see :func:`fastrec.serving.ray.build`.

    Args:
        path: see :mod:`fastrec.serving.repository`.
        config: of the scheduler, as plain types.
        auth: a file that says who may call.
        cache: where compiled checkpoints are kept.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it, in the loop that requests run in
        self,
        path: str,
        config: Mapping[str, Any],
        *,
        auth: str | None = None,
        cache: str | None = None,
    ) -> None:
        settings = ServingConfig.from_dict(config)
        self._place = place()
        self.core = InferenceCore(settings)
        recorder = Recorder(settings)
        self.core.subscribe(recorder)
        self._load = LoadMeter(self.core)
        self.core.subscribe(self._load)
        self._repository = repository = ModelRepository(
            path, self.core, cache=None if cache is None else Path(cache)
        )
        self._handler = RequestHandler(
            self.core,
            repository,
            auth=None if auth is None else Auth.read(Path(auth)),
            admin=False,
            statistics=recorder.statistics,
        )
        self._calls = InferenceService(self._handler).calls()
        await repository.load_all()

    async def infer(
        self, model: str, inputs: dict[str, np.ndarray], **fields: Any
    ) -> dict[str, np.ndarray]:
        """Outputs by name, for other deployments: ``await handle.infer.remote("ranker", inputs)``.

        Args:
            fields: other fields of :class:`Request`, and ``timeout_s``.

        Raises:
            Rejected: not answered, and why.
        """
        timeout_s = fields.pop("timeout_s", None)
        if timeout_s is not None:
            fields["deadline"] = self.core.clock.now() + timeout_s
        request = Request(model, fields.pop("version", ""), inputs, **fields)
        return (await self.core.infer(request)).outputs

    def place(self) -> list[str]:
        """Region, zone and node of this replica."""
        return list(self._place)

    def check_health(self) -> None:
        """Raises where a model's engines are gone for good: Ray then starts another replica."""
        for info in self.core.models():
            if info.state == "FAILED":
                raise RuntimeError(f"no engine of model '{info.name}' is left")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For :mod:`.scaling`."""
        return {"queue_delay_s": self._load.queue_delay_s(), "busy": self._load.busy()}

    def record_routing_stats(self) -> dict[str, Any]:
        """For :mod:`.routing`."""
        return {"place": list(self._place), "wait_s": self._load.wait_s()}

    async def __del__(self) -> None:
        """Serve awaits it once the requests in flight are answered."""
        await self.core.close()
        self._repository.close()

    async def _answer(self, name: str, data: bytes, context: Any) -> _Bytes:
        try:
            return _Bytes(await self._calls[name](data, _Context(context)))
        except Aborted as status:
            # Ray's context goes back with the answer.
            context.set_code(status.code)
            context.set_details(status.text)
            context.set_trailing_metadata(list(status.trailers))
            return _Bytes(b"")


def _method(name: str) -> Any:
    async def call(self: Replica, request: bytes, grpc_context: Any) -> _Bytes:
        return await self._answer(name, request, grpc_context)

    call.__name__, call.__doc__ = name, f"The protocol's {name}."
    return call


for _name in CALLS:
    setattr(Replica, _name, _method(_name))


class _Bytes:
    """A reply as Serve expects it."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


class _Context:
    """Ray's record of a call, as the servicer context that our calls expect."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    def auth_context(self) -> Any:
        return self._context.auth_context()

    def peer(self) -> str:
        return str(self._context.peer())

    def time_remaining(self) -> None:
        """Ray does not hand the call's deadline on; the request's own timeout counts."""


__all__ = ["CALLS", "Replica"]

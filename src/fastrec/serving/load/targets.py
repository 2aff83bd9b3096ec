"""Targets of load tests: any server of the Open Inference Protocol v2 over gRPC, or a core in this
process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, MissingDependencyError, ServingError
from fastrec.serving.core.inference_core import InferenceCore
from fastrec.serving.core.request import QUEUE_FULL, TIMED_OUT, Rejected, Request
from fastrec.serving.core.tasks import keep
from fastrec.serving.load.generator import OK, PlannedRequest, TryResult
from fastrec.serving.load.plan import RequestSizes
from fastrec.spec import InputSpec

try:
    import grpc

    from fastrec.serving.wire.messages import SERVICE, InferRequest, methods
    from fastrec.serving.wire.status import PUSHBACK, refusal_details
    from fastrec.serving.wire.tensors import add_raw
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] not in ("grpc", "google"):
        raise
    raise MissingDependencyError(error.name, "serve", "fastrec.serving.load") from error

VARIANTS = 16


def requests_of(
    spec: InputSpec, sizes: RequestSizes, variants: int = VARIANTS
) -> list[list[dict[str, np.ndarray]]]:
    """Random requests that a spec accepts: for each size of the ladder, some of each.

    Raises:
        ArgumentError: an input without an id range, of which nothing is known but its type.
    """
    return [
        [
            dict(
                zip(
                    spec.names,
                    spec.sample({"B": sizes.users, "m": candidates}, seed=seed),
                    strict=True,
                )
            )
            for seed in range(variants)
        ]
        for candidates in sizes.ladder()
    ]


def requests_in(path: str | Path) -> list[list[dict[str, np.ndarray]]]:
    """The one request that a ``.npz`` file holds, input by input: for servers that do not report
    their id ranges.

    Raises:
        ArgumentError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [[dict(arrays)]]
    except (OSError, ValueError) as error:
        raise ArgumentError("request", "a readable .npz file", f"{path}: {error}") from error


class CoreTarget:
    """A core in this process: no wire, and its scheduler shares the generator's thread."""

    def __init__(
        self, core: InferenceCore, model: str, requests: Sequence[Sequence[dict[str, np.ndarray]]]
    ) -> None:
        self._core, self._model, self._requests = core, model, requests
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, shot: PlannedRequest, done: Callable[[TryResult], None]) -> None:
        """See :class:`fastrec.serving.load.generator.Target`."""
        keep(self._tasks, self._send(shot, done))

    async def _send(self, shot: PlannedRequest, done: Callable[[TryResult], None]) -> None:
        kinds = self._requests[shot.size]
        timeout = shot.timeout_s
        request = Request(
            self._model,
            "",
            kinds[shot.variant % len(kinds)],
            priority=shot.priority,
            deadline=None if timeout is None else self._core.clock.now() + timeout,
            tier=shot.tier,
            tenant=shot.tenant,
        )
        try:
            await self._core.infer(request)
        except Rejected as refusal:
            done(TryResult(str(refusal.kind), refusal.retry_after_s, str(refusal)))
        else:
            done(TryResult(OK))


class GrpcTarget:
    """A server at ``HOST:PORT``; an async context manager.

    Args:
        model: its name.
        connections: over which requests take turns; a server may bound the streams of each.
        timeout_s: of gRPC, for requests that bring none: after it they have failed with "timeout".
        token: sent as a bearer token.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        connections: int = 2,
        timeout_s: float = 10.0,
        token: str = "",
    ) -> None:
        # Channels to one address share a connection unless they are told not to.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self.address, self.model, self._timeout = address, model, timeout_s
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _ in range(connections)
        ]
        self._calls = [c.unary_unary(f"/{SERVICE}/ModelInfer") for c in self._channels]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self._messages: list[list[bytes]] = []
        self._parameters: dict[tuple[str, str, int, float | None], bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> GrpcTarget:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def spec(self) -> InputSpec | None:
        """The model's inputs with their id ranges; None where the server does not report them.

        Raises:
            ServingError: the server cannot be reached, or has no such model.
        """
        kind, reply = methods(SERVICE)["ModelConfig"]
        call = self._channels[0].unary_unary(
            f"/{SERVICE}/ModelConfig",
            request_serializer=kind.SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            answer = await call(
                kind(name=self.model), timeout=self._timeout, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            told = f"{error.code().name}: {error.details()}"
            raise ServingError(f"{self.address}, model {self.model!r}: {told}") from error
        parameters = answer.config.parameters
        if "inputs" not in parameters:
            return None
        return InputSpec.from_dict(json.loads(parameters["inputs"].string_value))

    def prepare(self, requests: Sequence[Sequence[dict[str, np.ndarray]]]) -> None:
        """Encode what is to be sent, once."""
        self._messages = [[self._encoded(inputs) for inputs in kinds] for kinds in requests]

    def _encoded(self, inputs: dict[str, np.ndarray]) -> bytes:
        request = InferRequest(model_name=self.model)
        add_raw(request.inputs, request.raw_input_contents, inputs)
        return bytes(request.SerializeToString())

    def _hints(self, shot: PlannedRequest) -> bytes:
        """Encoded parameters: messages one after another are one message, so these are appended."""
        key = (shot.tier, shot.tenant, shot.priority, shot.timeout_s)
        known = self._parameters.get(key)
        if known is None:
            request = InferRequest()
            if shot.tier:
                request.parameters["tier"].string_param = shot.tier
            if shot.tenant:
                request.parameters["tenant"].string_param = shot.tenant
            if shot.priority:
                request.parameters["priority"].uint64_param = shot.priority
            if shot.timeout_s is not None:
                request.parameters["timeout"].int64_param = round(shot.timeout_s * 1e6)
            known = self._parameters[key] = bytes(request.SerializeToString())
        return known

    def send(self, shot: PlannedRequest, done: Callable[[TryResult], None]) -> None:
        """See :class:`fastrec.serving.load.generator.Target`."""
        keep(self._tasks, self._send(shot, done))

    async def _send(self, shot: PlannedRequest, done: Callable[[TryResult], None]) -> None:
        kinds = self._messages[shot.size]
        data = kinds[shot.variant % len(kinds)] + self._hints(shot)
        call = self._calls[shot.number % len(self._calls)]
        try:
            await call(data, timeout=shot.timeout_s or self._timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            done(_refusal(error))
        else:
            done(TryResult(OK))


def _refusal(error: Any) -> TryResult:
    """The reason that a machine reads, where the server gives one; else the code's name."""
    outcome, retry = refusal_details(error.trailing_metadata())
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK and value.startswith("-"):
            # As gRPC's own retries read it.
            retry = -1.0
    code, text = error.code().name.lower(), error.details() or ""
    if code == "deadline_exceeded":
        outcome = "timeout"
    # Triton gives no reason but these texts.
    elif not outcome and QUEUE_FULL in text:
        outcome = "queue_full"
    elif not outcome and TIMED_OUT in text:
        outcome = "expired"
    return TryResult(outcome or code, retry, text)

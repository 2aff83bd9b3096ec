"""What load is put on: any server of the Open Inference Protocol v2 over gRPC, or a runtime in this
process."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, MissingDependencyError, ServingError
from fastrec.runtime.spec import InputSpec
from fastrec.serving.core.request import QUEUE_FULL, TIMED_OUT, Rejected, Request
from fastrec.serving.core.runtime import Runtime
from fastrec.serving.load.generator import OK, Answer, Shot
from fastrec.serving.load.plan import Sizes

try:
    import grpc

    from fastrec.serving.load.caller import (
        TIMEOUT,
        UNAVAILABLE,
        Caller,
        Done,
        connect,
        trailers_of,
    )
    from fastrec.serving.wire.frames import Headers
    from fastrec.serving.wire.messages import SERVICE, InferRequest, message, methods
    from fastrec.serving.wire.status import DETAILS, PUSHBACK
    from fastrec.serving.wire.tensors import datatype, to_raw
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] not in ("grpc", "google", "hpack"):
        raise
    raise MissingDependencyError(error.name, "serve", "fastrec.serving.load") from error

VARIANTS = 16
_NAMES = {str(code.value[0]): code.name.lower() for code in grpc.StatusCode}
_Status = message("google.rpc.Status")
_ErrorInfo = message("google.rpc.ErrorInfo")
_RetryInfo = message("google.rpc.RetryInfo")


def requests_of(
    spec: InputSpec, sizes: Sizes, variants: int = VARIANTS
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
    """The one request that a ``.npz`` file holds, input by input: for servers that do not tell
    which ids they take.

    Raises:
        ArgumentError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [[dict(arrays)]]
    except (OSError, ValueError) as error:
        raise ArgumentError("request", "a readable .npz file", f"{path}: {error}") from error


class RuntimeTarget:
    """A runtime in this process: no wire, and its scheduler shares the generator's thread."""

    def __init__(
        self, runtime: Runtime, model: str, requests: Sequence[Sequence[dict[str, np.ndarray]]]
    ) -> None:
        self._runtime, self._model, self._requests = runtime, model, requests
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, shot: Shot, done: Callable[[Answer], None]) -> None:
        """See :class:`fastrec.serving.load.generator.Target`."""
        _keep(self._tasks, self._send(shot, done))

    async def _send(self, shot: Shot, done: Callable[[Answer], None]) -> None:
        kinds = self._requests[shot.size]
        timeout = shot.timeout_s
        request = Request(
            self._model,
            "",
            kinds[shot.variant % len(kinds)],
            priority=shot.priority,
            deadline=None if timeout is None else self._runtime.clock.now() + timeout,
            tier=shot.tier,
            tenant=shot.tenant,
        )
        try:
            await self._runtime.infer(request)
        except Rejected as refusal:
            done(Answer(str(refusal.kind), refusal.retry_after_s))
        else:
            done(Answer(OK))


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
        self.address, self.model, self._timeout = address, model, timeout_s
        self._headers = (("authorization", f"Bearer {token}"),) if token else ()
        self._links: list[_Link] = [_Link(self) for _ in range(connections)]
        self._messages: list[list[bytes]] = []
        self._parameters: dict[tuple[str, str, int, float | None], bytes] = {}

    async def __aenter__(self) -> GrpcTarget:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.gather(*(link.close() for link in self._links))

    async def spec(self) -> InputSpec | None:
        """The model's inputs with their id ranges; None where the server does not tell them.

        Raises:
            ServingError: the server cannot be reached, or has no such model.
        """
        kind, reply = methods(SERVICE)["ModelConfig"]
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/ModelConfig",
                request_serializer=kind.SerializeToString,
                response_deserializer=reply.FromString,
            )
            try:
                answer = await call(
                    kind(name=self.model), timeout=self._timeout, metadata=self._headers
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
        for name, array in inputs.items():
            request.inputs.add(name=name, datatype=datatype(array.dtype), shape=array.shape)
            request.raw_input_contents.append(to_raw(array))
        return bytes(request.SerializeToString())

    def _hints(self, shot: Shot) -> bytes:
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

    def send(self, shot: Shot, done: Callable[[Answer], None]) -> None:
        """See :class:`fastrec.serving.load.generator.Target`."""
        kinds = self._messages[shot.size]
        data = kinds[shot.variant % len(kinds)] + self._hints(shot)
        link = self._links[shot.number % len(self._links)]
        link.call(data, shot.timeout_s or self._timeout, lambda told: done(_answer(told)))


class _Link:
    """A connection that is made when it is needed, and again when the server has sent it away."""

    def __init__(self, target: GrpcTarget) -> None:
        self._target = target
        self._caller: Caller | None = None
        self._waiting: list[tuple[bytes, float, Done]] = []
        self._task: asyncio.Task[None] | None = None

    def call(self, message: bytes, timeout_s: float, done: Done) -> None:
        if self._caller is not None and not self._caller.leaving:
            self._caller.call(message, timeout_s, done)
            return
        self._waiting.append((message, timeout_s, done))
        if self._task is None:
            self._task = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        target = self._target
        try:
            path = f"/{SERVICE}/ModelInfer"
            self._caller = await connect(target.address, path, target._headers, target._timeout)
        except (OSError, asyncio.TimeoutError):
            self._caller = None
        self._task = None
        waiting, self._waiting = self._waiting, []
        for message, timeout_s, done in waiting:
            if self._caller is None:
                done((("grpc-status", UNAVAILABLE),))
            else:
                self._caller.call(message, timeout_s, done)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._caller is not None:
            self._caller.transport.close()


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


@functools.lru_cache(1024)
def _answer(headers: Headers) -> Answer:
    """The reason that a machine reads, where the server gives one; else the code's name."""
    code, text, others = trailers_of(headers)
    if code == "0":
        return Answer(OK)
    retry: float | None = None
    outcome = ""
    if details := others.get(DETAILS):
        for detail in _Status.FromString(details).details:
            if detail.type_url.endswith(_ErrorInfo.DESCRIPTOR.full_name):
                outcome = _ErrorInfo.FromString(detail.value).reason.lower()
            elif detail.type_url.endswith(_RetryInfo.DESCRIPTOR.full_name):
                delay = _RetryInfo.FromString(detail.value).retry_delay
                retry = delay.seconds + delay.nanos / 1e9
    # As gRPC's own retries read it.
    if str(others.get(PUSHBACK, "")).startswith("-"):
        retry = -1.0
    if code == TIMEOUT:
        return Answer("timeout", retry)
    # Triton gives no reason but these texts.
    if not outcome and QUEUE_FULL in text:
        outcome = "queue_full"
    elif not outcome and TIMED_OUT in text:
        outcome = "expired"
    return Answer(outcome or _NAMES.get(code, code), retry)

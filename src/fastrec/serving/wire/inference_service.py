"""The Open Inference Protocol's calls, bytes in and bytes out: decode, handle, encode.

Messages are taken and given as bytes, so that what does not parse gets INVALID_ARGUMENT with a
reason instead of gRPC's INTERNAL. What hosts the calls (:mod:`.grpc_server`, Ray) brings a context
with gRPC's methods, and ends a call that raises :class:`Aborted` with that status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from fastrec import __version__
from fastrec.errors import ArgumentError
from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.wire.auth import Identity
from fastrec.serving.wire.messages import (
    LOAD_SERVICE,
    SERVICE,
    DecodeError,
    InferRequest,
    InferResponse,
    methods,
)
from fastrec.serving.wire.model_metadata import configuration, metadata
from fastrec.serving.wire.request_handler import EXTENSIONS, RequestHandler
from fastrec.serving.wire.request_parameters import from_values, parameter_values, with_headers
from fastrec.serving.wire.status import trailers
from fastrec.serving.wire.tensors import add_raw, tensor_inputs

_MAX_ID = 128

Call = Callable[[bytes, Any], Awaitable[bytes]]


class Aborted(Exception):
    """A call ends with a status."""

    def __init__(
        self, code: grpc.StatusCode, text: str, trailers: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self.code, self.text, self.trailers = code, text, trailers
        super().__init__(text)


class InferenceService:
    """Answers the protocol's calls from a handler."""

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler
        self._replies = {name: reply for name, (_, reply) in methods(SERVICE).items()}

    def calls(self) -> dict[str, Call]:
        """By the protocol's names, ``(request, context) -> reply``; what is not there is
        UNIMPLEMENTED."""
        calls: dict[str, Callable[[Any, Identity, Any], Awaitable[Any]]] = {
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        probes = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
        }
        found: dict[str, Call] = {"ModelInfer": self._model_infer}
        for name, (kind, _) in methods(SERVICE).items():
            if name in calls:
                found[name] = self._guarded(name, kind, calls[name], anyone=False)
            elif name in probes:
                found[name] = self._guarded(name, kind, probes[name], anyone=True)
        return found

    def load_calls(self) -> dict[str, Call]:
        """Those of ``fastrec.serving.Load``, as :meth:`calls`."""
        kind, self._load_reply = methods(LOAD_SERVICE)["Probe"]
        return {"Probe": self._guarded("Probe", kind, self._probe, anyone=False)}

    def _guarded(
        self, name: str, kind: Any, call: Callable[..., Awaitable[Any]], *, anyone: bool
    ) -> Call:
        """A handler that parses, identifies the caller (not for probes) and maps errors."""

        async def handle(data: bytes, context: Any) -> bytes:
            try:
                request = _parse(kind, data)
                identity = None if anyone else self._identify(context)
                reply = await call(request, identity, context)
                return bytes(reply.SerializeToString())
            except Exception as error:
                raise self._refusal(error, name) from error

        return handle

    async def _model_infer(self, data: bytes, context: Any) -> bytes:
        try:
            request = _parse(InferRequest, data)
            values = parameter_values(request.parameters) if request.parameters else {}
            metadata = context.invocation_metadata()
            parameters = from_values(with_headers(values, metadata) if metadata else values)
            identity = self._identify(context)
            remaining_s = context.time_remaining()
            # What the server sheds is refused before a tensor is decoded.
            self._handler.turn_away(
                request.model_name, request.model_version, request.inputs, parameters, identity,
                remaining_s,
            )  # fmt: skip
            if len(request.id) > _MAX_ID:
                raise ArgumentError("id", f"at most {_MAX_ID} characters", len(request.id))
            response = await self._handler.infer(
                request.model_name,
                request.model_version,
                tensor_inputs(request),
                parameters,
                identity,
                remaining_s=remaining_s,
                request_id=request.id,
                outputs=[output.name for output in request.outputs],
                headers=metadata or (),
            )
            reply = InferResponse(
                model_name=response.model, model_version=response.version, id=request.id
            )
            add_raw(reply.outputs, reply.raw_output_contents, response.outputs)
            return bytes(reply.SerializeToString())
        except Exception as error:
            raise self._refusal(error, "ModelInfer") from error

    def _identify(self, context: Any) -> Identity:
        if self._handler.auth is None:
            return self._handler.identify(None, ())
        authorization = None
        for name, value in context.invocation_metadata() or ():
            if name == "authorization":
                authorization = value
        known = context.auth_context()
        names = [
            value.decode("utf-8", "replace")
            for key in ("x509_common_name", "x509_subject_alternative_name")
            for value in known.get(key, ())
        ]
        return self._handler.identify(authorization, names)

    def _refusal(self, error: Exception, where: str) -> Aborted:
        told = self._handler.error_reply(error, where)
        return Aborted(told.code, told.text, trailers(told))

    async def _server_live(self, _request: Any, _who: Any, _context: Any) -> Any:
        return self._replies["ServerLive"](live=True)

    async def _server_ready(self, _request: Any, _who: Any, _context: Any) -> Any:
        return self._replies["ServerReady"](ready=self._handler.core.ready())

    async def _model_ready(self, request: Any, _who: Any, _context: Any) -> Any:
        # Unknown models are not ready; as with Triton, that is no error.
        ready = self._handler.core.ready(request.name, request.version)
        return self._replies["ModelReady"](ready=ready)

    async def _probe(self, request: Any, _who: Any, _context: Any) -> Any:
        users, rows = max(request.users, 0), max(request.rows, 0)
        load = self._handler.core.load_of(request.model, request.version, users, rows)
        return self._load_reply(**load._asdict())

    async def _server_metadata(self, _request: Any, _who: Any, _context: Any) -> Any:
        return self._replies["ServerMetadata"](
            name="fastrec", version=__version__, extensions=EXTENSIONS
        )

    async def _model_metadata(self, request: Any, _who: Any, _context: Any) -> Any:
        info = self._handler.core.model(request.name, request.version)
        versions = [request.version] if request.version else self._handler.versions(request.name)
        return metadata(info, versions)

    async def _model_config(self, request: Any, _who: Any, _context: Any) -> Any:
        info = self._handler.core.model(request.name, request.version)
        return configuration(info, self._handler.core.config.lanes, self._handler.details(info))

    async def _model_statistics(self, request: Any, _who: Any, _context: Any) -> Any:
        if request.name:
            self._handler.core.model(request.name, request.version)
        reply = self._replies["ModelStatistics"]()
        for row in self._handler.statistics(request.name, request.version):
            entry = reply.model_stats.add(
                name=row["name"],
                version=row["version"],
                last_inference=row["last_inference"],
                inference_count=row["inference_count"],
                execution_count=row["execution_count"],
            )
            for kind, (count, ns) in row["inference_stats"].items():
                duration = getattr(entry.inference_stats, kind)
                duration.count, duration.ns = count, ns
        return reply

    async def _repository_index(self, request: Any, _who: Any, _context: Any) -> Any:
        _one_repository(request)
        rows = self._handler.index()
        if request.ready:
            rows = [row for row in rows if row["state"] == "READY"]
        return self._replies["RepositoryIndex"](models=rows)

    async def _load(self, request: Any, who: Identity, context: Any) -> Any:
        _one_repository(request)
        self._handler.require_admin(who, context.peer())
        if request.parameters:
            # Triton's "config" and "file:" parameters would bring models from outside.
            raise ArgumentError("parameters", "none", sorted(request.parameters)[0][:64])
        await self._handler.load(request.model_name, who, context.peer())
        return self._replies["RepositoryModelLoad"]()

    async def _unload(self, request: Any, who: Identity, context: Any) -> Any:
        _one_repository(request)
        await self._handler.unload(request.model_name, who, context.peer())
        return self._replies["RepositoryModelUnload"]()


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        raise ArgumentError(
            "request", f"a {kind.DESCRIPTOR.name}", f"{len(data)} bytes that do not parse as one"
        ) from None


def _one_repository(request: Any) -> None:
    if request.repository_name:
        raise Rejected(Kind.NOT_FOUND, "there is one repository, and it has no name")

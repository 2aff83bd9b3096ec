"""The Open Inference Protocol over grpc.aio: decode, ask the door, encode.

Messages are taken and given as bytes, so that what does not parse gets INVALID_ARGUMENT with a
reason instead of gRPC's INTERNAL. Memory is bounded by the message size, the streams a connection
may open and the age a connection may reach, which also ends clients that never finish a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fastrec import __version__
from fastrec.errors import ArgumentError
from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.wire import services
from fastrec.serving.wire.auth import Identity
from fastrec.serving.wire.cards import configuration, metadata
from fastrec.serving.wire.door import EXTENSIONS, Door
from fastrec.serving.wire.hints import from_values, of_parameters, with_headers
from fastrec.serving.wire.messages import (
    SERVICE,
    DecodeError,
    InferRequest,
    InferResponse,
    methods,
)
from fastrec.serving.wire.tensors import datatype, tensor_inputs, to_raw

_MIB = 1 << 20
_MAX_ID = 128


@dataclass(frozen=True)
class Tls:
    """Files in PEM form.

    Args:
        key, certificate: the server's.
        client_authority: certificates that client certificates must be signed by; None = clients
            need none.
    """

    key: Path
    certificate: Path
    client_authority: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """The contents.

        Raises:
            ArgumentError: a file cannot be read.
        """
        try:
            authority = self.client_authority
            signed_by = None if authority is None else authority.read_bytes()
            return self.key.read_bytes(), self.certificate.read_bytes(), signed_by
        except OSError as error:
            raise ArgumentError(
                "tls", "readable PEM files", f"{error.filename}: {error}"
            ) from error


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may make the server hold.

    Args:
        message_mib: largest request or response.
        streams: concurrent requests of one connection.
        connection_age_s: connections are asked to go after this time, so that clients behind a load
            balancer spread over new servers; 30 s later they are closed.
        rpcs: concurrent requests in all; more are refused with RESOURCE_EXHAUSTED.
    """

    message_mib: int = 16
    streams: int = 1024
    connection_age_s: float = 300.0
    rpcs: int = 16_384

    def options(self, *, reuse_port: bool) -> list[tuple[str, int]]:
        """As grpc's channel arguments."""
        return [
            ("grpc.max_receive_message_length", self.message_mib * _MIB),
            ("grpc.max_send_message_length", self.message_mib * _MIB),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.max_connection_age_ms", round(self.connection_age_s * 1e3)),
            ("grpc.max_connection_age_grace_ms", 30_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.so_reuseport", int(reuse_port)),
        ]


class GrpcServer:
    """A grpc.aio server in front of a door.

    Args:
        door: what answers.
        address: ``HOST:PORT``; port 0 takes a free one, see :attr:`port`.
        tls: None = plain text.
        reuse_port: whether several processes may listen at this address.
    """

    def __init__(
        self,
        door: Door,
        address: str,
        *,
        tls: Tls | None = None,
        limits: Limits | None = None,
        reuse_port: bool = False,
    ) -> None:
        limits = limits or Limits()
        self._door = door
        self._server = grpc.aio.server(
            options=limits.options(reuse_port=reuse_port), maximum_concurrent_rpcs=limits.rpcs
        )
        self.health = services.Health(self._serving)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, self._handlers()),
                self.health.handler(),
                *services.reflection(),
            )
        )
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                key, certificate, authority = tls.read()
                self.port = self._server.add_secure_port(
                    address,
                    grpc.ssl_server_credentials(
                        [(key, certificate)], authority, authority is not None
                    ),
                )
        except RuntimeError as error:
            raise ArgumentError("address", "one that can be listened at", address) from error

    async def start(self) -> None:
        """Listen."""
        await self._server.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new requests, give those in flight ``grace_s``, close."""
        self.health.close()
        await self._server.stop(grace_s)

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
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
        self._replies = {name: reply for name, (_, reply) in methods(SERVICE).items()}
        handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(self._model_infer)}
        for name, (kind, _) in methods(SERVICE).items():
            if name in calls:
                call = self._guarded(name, kind, calls[name], anyone=False)
            elif name in probes:
                call = self._guarded(name, kind, probes[name], anyone=True)
            else:
                continue
            handlers[name] = grpc.unary_unary_rpc_method_handler(call)
        return handlers

    def _guarded(
        self, name: str, kind: Any, call: Callable[..., Awaitable[Any]], *, anyone: bool
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        """A handler that parses, identifies the caller (not for probes) and tells errors."""

        async def handle(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                request = _parse(kind, data)
                identity = None if anyone else self._identify(context)
                reply = await call(request, identity, context)
                return bytes(reply.SerializeToString())
            except asyncio.CancelledError:
                raise
            except Exception as error:
                return await self._refuse(context, error, name)

        return handle

    async def _model_infer(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            request = _parse(InferRequest, data)
            values = of_parameters(request.parameters) if request.parameters else {}
            metadata = context.invocation_metadata()
            hints = from_values(with_headers(values, metadata) if metadata else values)
            if len(request.id) > _MAX_ID:
                raise ArgumentError("id", f"at most {_MAX_ID} characters", len(request.id))
            response = await self._door.infer(
                request.model_name,
                request.model_version,
                tensor_inputs(request),
                hints,
                self._identify(context),
                remaining_s=context.time_remaining(),
                request_id=request.id,
                outputs=[output.name for output in request.outputs],
                headers=metadata or (),
            )
            reply = InferResponse(
                model_name=response.model, model_version=response.version, id=request.id
            )
            for name, array in response.outputs.items():
                reply.outputs.add(name=name, datatype=datatype(array.dtype), shape=array.shape)
                reply.raw_output_contents.append(to_raw(array))
            return bytes(reply.SerializeToString())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return await self._refuse(context, error, "ModelInfer")

    def _identify(self, context: grpc.aio.ServicerContext) -> Identity:
        if self._door.auth is None:
            return self._door.identify(None, ())
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
        return self._door.identify(authorization, names)

    async def _refuse(
        self, context: grpc.aio.ServicerContext, error: Exception, where: str
    ) -> bytes:
        told = self._door.answer(error, where)
        await context.abort(told.code, told.text, told.trailers())
        raise AssertionError("abort raises")

    def _serving(self, service: str) -> bool | None:
        """Whether a service of the health protocol serves; None for an unknown one."""
        if service in ("", SERVICE):
            return self._door.runtime.ready()
        try:
            self._door.runtime.model(service)
        except Rejected:
            return None
        return self._door.runtime.ready(service)

    async def _server_live(self, _request: Any, _who: Any, _context: Any) -> Any:
        return self._replies["ServerLive"](live=True)

    async def _server_ready(self, _request: Any, _who: Any, _context: Any) -> Any:
        return self._replies["ServerReady"](ready=self._door.runtime.ready())

    async def _model_ready(self, request: Any, _who: Any, _context: Any) -> Any:
        # Unknown models are not ready; as with Triton, that is no error.
        ready = self._door.runtime.ready(request.name, request.version)
        return self._replies["ModelReady"](ready=ready)

    async def _server_metadata(self, _request: Any, _who: Any, _context: Any) -> Any:
        return self._replies["ServerMetadata"](
            name="fastrec", version=__version__, extensions=EXTENSIONS
        )

    async def _model_metadata(self, request: Any, _who: Any, _context: Any) -> Any:
        info = self._door.runtime.model(request.name, request.version)
        versions = [request.version] if request.version else self._door.versions(request.name)
        return metadata(info, versions)

    async def _model_config(self, request: Any, _who: Any, _context: Any) -> Any:
        info = self._door.runtime.model(request.name, request.version)
        return configuration(info, self._door.runtime.config.lanes, self._door.details(info))

    async def _model_statistics(self, request: Any, _who: Any, _context: Any) -> Any:
        if request.name:
            self._door.runtime.model(request.name, request.version)
        reply = self._replies["ModelStatistics"]()
        for row in self._door.statistics(request.name, request.version):
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
        rows = self._door.index()
        if request.ready:
            rows = [row for row in rows if row["state"] == "READY"]
        return self._replies["RepositoryIndex"](models=rows)

    async def _load(self, request: Any, who: Identity, context: Any) -> Any:
        _one_repository(request)
        self._door.require_admin(who, context.peer())
        if request.parameters:
            # Triton's "config" and "file:" parameters would bring models from outside.
            raise ArgumentError("parameters", "none", sorted(request.parameters)[0][:64])
        await self._door.load(request.model_name, who, context.peer())
        return self._replies["RepositoryModelLoad"]()

    async def _unload(self, request: Any, who: Identity, context: Any) -> Any:
        _one_repository(request)
        await self._door.unload(request.model_name, who, context.peer())
        return self._replies["RepositoryModelUnload"]()


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        raise ArgumentError(
            "request", f"a {kind.DESCRIPTOR.name}", f"{len(data)} bytes that are none"
        ) from None


def _one_repository(request: Any) -> None:
    if request.repository_name:
        raise Rejected(Kind.NOT_FOUND, "there is one repository, and it has no name")

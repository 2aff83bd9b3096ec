"""The Open Inference Protocol over grpc.aio.

Memory is bounded by the message size, the streams a connection may open and the age a connection
may reach, which also ends clients that never finish a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from fastrec.errors import ArgumentError
from fastrec.serving.core.request import Rejected
from fastrec.serving.wire.health import Health
from fastrec.serving.wire.inference_service import Aborted, Call, InferenceService
from fastrec.serving.wire.messages import HEALTH_SERVICE, LOAD_SERVICE, SERVICE, pool
from fastrec.serving.wire.request_handler import RequestHandler
from fastrec.serving.wire.tls import Tls

_MIB = 1 << 20


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
    streams: int = 128
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
    """A grpc.aio server in front of a handler.

    Args:
        handler: what answers.
        address: ``HOST:PORT``; port 0 takes a free one, see :attr:`port`.
        tls: None = plain text.
        reuse_port: whether several processes may listen at this address.
    """

    def __init__(
        self,
        handler: RequestHandler,
        address: str,
        *,
        tls: Tls | None = None,
        limits: Limits | None = None,
        reuse_port: bool = False,
    ) -> None:
        limits = limits or Limits()
        self._handler = handler
        self._server = grpc.aio.server(
            options=limits.options(reuse_port=reuse_port), maximum_concurrent_rpcs=limits.rpcs
        )
        self.health = Health(self._serving)
        service = InferenceService(handler)
        self._server.add_generic_rpc_handlers(
            (
                _handler(SERVICE, service.calls()),
                _handler(LOAD_SERVICE, service.load_calls()),
                self.health.handler(),
                *_reflection(),
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

    def _serving(self, service: str) -> bool | None:
        """Whether a service of the health protocol serves; None for an unknown one."""
        if service in ("", SERVICE):
            return self._handler.core.ready()
        try:
            self._handler.core.model(service)
        except Rejected:
            return None
        return self._handler.core.ready(service)


def _reflection() -> list[grpc.GenericRpcHandler]:
    """Reflection v1 and v1alpha: the messages are the same, grpcio-reflection has the latter."""
    versions = [f"grpc.reflection.{v}.ServerReflection" for v in ("v1", "v1alpha")]
    services = (SERVICE, LOAD_SERVICE, HEALTH_SERVICE, *versions)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(services, pool=pool).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        for name in versions
    ]


def _handler(service: str, calls: dict[str, Call]) -> grpc.GenericRpcHandler:
    made = {name: grpc.unary_unary_rpc_method_handler(_hosted(c)) for name, c in calls.items()}
    return grpc.method_handlers_generic_handler(service, made)


def _hosted(call: Call) -> Call:
    async def handle(data: bytes, context: Any) -> bytes:
        try:
            return await call(data, context)
        except Aborted as status:
            await context.abort(status.code, status.text, status.trailers)
            raise AssertionError("abort raises") from status

    return handle

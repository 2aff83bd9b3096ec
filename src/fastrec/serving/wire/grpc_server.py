"""The Open Inference Protocol over gRPC.

Memory is bounded by the message size, the streams a connection may open and the age a connection
may reach, which also ends clients that never finish a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from fastrec.serving.core.request import Rejected
from fastrec.serving.wire import services
from fastrec.serving.wire.calls import Call, InferenceService
from fastrec.serving.wire.door import Door
from fastrec.serving.wire.grpc_host import GrpcHost
from fastrec.serving.wire.messages import LOAD_SERVICE, SERVICE
from fastrec.serving.wire.tls import Tls


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may make the server hold.

    Args:
        message_mib: largest request or response.
        streams: concurrent requests of one connection.
        connection_age_s: connections are asked to go after this time, so that clients behind a load
            balancer spread over new servers; 30 s later they are closed.
        rpcs: concurrent requests in all; more are refused with RESOURCE_EXHAUSTED.
        connections: more are closed at once.
    """

    message_mib: int = 16
    streams: int = 1024
    connection_age_s: float = 300.0
    rpcs: int = 16_384
    connections: int = 4096


class GrpcServer:
    """A gRPC server in front of a door.

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
        self._door = door
        self.health = services.Health(self._serving)
        service = InferenceService(door)
        self._host = GrpcHost(
            (
                _handler(SERVICE, service.calls()),
                _handler(LOAD_SERVICE, service.load_calls()),
                self.health.handler(),
                *services.reflection(),
            ),
            address,
            limits or Limits(),
            tls=tls,
            reuse_port=reuse_port,
        )
        self.port = self._host.port

    async def start(self) -> None:
        """Listen."""
        await self._host.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new requests, give those in flight ``grace_s``, close."""
        self.health.close()
        await self._host.stop(grace_s)

    def _serving(self, service: str) -> bool | None:
        """Whether a service of the health protocol serves; None for an unknown one."""
        if service in ("", SERVICE):
            return self._door.runtime.ready()
        try:
            self._door.runtime.model(service)
        except Rejected:
            return None
        return self._door.runtime.ready(service)


def _handler(service: str, calls: dict[str, Call]) -> grpc.GenericRpcHandler:
    made = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
    return grpc.method_handlers_generic_handler(service, made)

"""``grpc.health.v1.Health``, the standard health check.

Not grpcio-health-checking's servicer: its ``Watch`` forgets all watchers of a service when one of
them leaves, and does not notice readiness that changes with time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from fastrec.serving.wire.messages import HEALTH_SERVICE, methods

_MOST_WATCHERS = 256
_POLL_S = 1.0


class Health:
    """``grpc.health.v1.Health``: "" and the protocol's service for the server, a name for a model.

    Args:
        serving: service -> whether it serves, None for one that is unknown.
    """

    def __init__(self, serving: Callable[[str], bool | None]) -> None:
        self._serving = serving
        self._closed = False
        self._watchers: set[asyncio.Event] = set()
        self._request, self._reply = methods(HEALTH_SERVICE)["Check"]
        status = self._reply.DESCRIPTOR.enum_types_by_name["ServingStatus"].values_by_name
        self._states = {
            True: status["SERVING"].number,
            False: status["NOT_SERVING"].number,
            None: status["SERVICE_UNKNOWN"].number,
        }

    def handler(self) -> grpc.GenericRpcHandler:
        """For ``server.add_generic_rpc_handlers``."""
        kinds = {
            "request_deserializer": self._request.FromString,
            "response_serializer": self._reply.SerializeToString,
        }
        return grpc.method_handlers_generic_handler(
            HEALTH_SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, **kinds),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, **kinds),
            },
        )

    def changed(self) -> None:
        """Tell watchers to look again."""
        for event in self._watchers:
            event.set()

    def close(self) -> None:
        """Nothing serves from here on: load balancers take the server out while it drains."""
        self._closed = True
        self.changed()

    def _state(self, service: str) -> int:
        serving = self._serving(service)
        return self._states[False if self._closed and serving else serving]

    async def _check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        state = self._state(request.service)
        if state == self._states[None]:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._reply(status=state)

    async def _watch(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if len(self._watchers) >= _MOST_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers")
        event = asyncio.Event()
        self._watchers.add(event)
        told = -1
        try:
            while True:
                event.clear()  # before looking: a change during the yield must not be lost
                state = self._state(request.service)
                if state != told:
                    told = state
                    yield self._reply(status=state)
                if self._closed:
                    return
                try:
                    # Readiness also depends on time (an engine ejected comes back), so look anyway.
                    await asyncio.wait_for(event.wait(), _POLL_S)
                except asyncio.TimeoutError:
                    continue
        finally:
            self._watchers.discard(event)

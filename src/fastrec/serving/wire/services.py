"""The two standard services beside the protocol's own: health checks and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from fastrec.serving.wire.messages import (
    HEALTH_SERVICE,
    LOAD_SERVICE,
    REFLECTION_SERVICES,
    SERVICE,
    message,
    methods,
    pool,
)

_LISTED = (SERVICE, LOAD_SERVICE, HEALTH_SERVICE, REFLECTION_SERVICES[0])
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


def reflection() -> list[grpc.GenericRpcHandler]:
    """Both versions of ``ServerReflection``; their messages are the same."""
    request, reply = methods(REFLECTION_SERVICES[0])["ServerReflectionInfo"]
    handler = grpc.stream_stream_rpc_method_handler(
        _reflect,
        request_deserializer=request.FromString,
        response_serializer=reply.SerializeToString,
    )
    return [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        for name in REFLECTION_SERVICES
    ]


async def _reflect(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
    reply_class = message("grpc.reflection.v1.ServerReflectionResponse")
    async for request in requests:
        reply = reply_class(valid_host=request.host, original_request=request)
        which = request.WhichOneof("message_request")
        try:
            if which == "list_services":
                for name in _LISTED:
                    reply.list_services_response.service.add(name=name)
            elif which == "file_by_filename":
                _add_files(reply, pool.FindFileByName(request.file_by_filename))
            elif which == "file_containing_symbol":
                _add_files(reply, pool.FindFileContainingSymbol(request.file_containing_symbol))
            elif which == "all_extension_numbers_of_type":
                name = request.all_extension_numbers_of_type
                pool.FindMessageTypeByName(name)
                reply.all_extension_numbers_response.base_type_name = name
            else:
                raise KeyError(which)
        except KeyError:
            code, text = grpc.StatusCode.NOT_FOUND.value
            reply.error_response.error_code, reply.error_response.error_message = code, text
        yield reply


def _add_files(reply: Any, file: Any) -> None:
    """A file and all that it imports, each once."""
    waiting, seen = [file], set()
    while waiting:
        file = waiting.pop()
        if file.name not in seen:
            seen.add(file.name)
            reply.file_descriptor_response.file_descriptor_proto.append(file.serialized_pb)
            waiting.extend(file.dependencies)

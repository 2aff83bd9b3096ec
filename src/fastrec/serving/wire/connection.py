"""The server's end of an HTTP/2 connection, and how long a client may hold it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastrec.serving.wire import frames as h2
from fastrec.serving.wire.frames import Broken, Headers
from fastrec.serving.wire.http2 import LAST_STREAM, Link, Stream

if TYPE_CHECKING:
    from fastrec.serving.wire.grpc_server import Limits

_HANDSHAKE_S = 10.0
_KEEPALIVE_S, _KEEPALIVE_TIMEOUT_S = 60.0, 20.0
_GRACE_S = 30.0
_LEAVING = b"fastrec."


class Shared:
    """What the connections of a server have in common.

    Attributes:
        calls: open on all of them.
    """

    def __init__(self, limits: Limits, begin: Callable[[Stream], None]) -> None:
        self.limits, self.begin = limits, begin
        self.connections: set[Connection] = set()
        self.calls = 0


class Connection(Link):
    """One client. ``shared.begin`` is called with each stream that it opens."""

    def __init__(self, shared: Shared) -> None:
        limits = shared.limits
        super().__init__(limits.streams, 4 * (limits.message_mib << 20))
        self._shared, self._limits = shared, limits
        self._greeted = self._leaving = False
        self._leaving_after: int | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._shared.connections) >= self._limits.connections:
            self.transport.abort()
            return
        self._shared.connections.add(self)
        self.write(self.greeting())
        # Connections that were made at once must not all end at once.
        age_s = self._limits.connection_age_s * random.uniform(0.9, 1.1)
        self._timer("handshake", _HANDSHAKE_S, self.transport.abort)
        self._timer("age", age_s, self.leave)
        self._timer("alive", _KEEPALIVE_S, self._ask)

    def connection_lost(self, error: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._shared.connections.discard(self)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._greeted:
            data = self._rest + data
            if not data.startswith(h2.PREFACE[: len(data)]):
                self.transport.abort()  # it would not understand us either
                return
            if len(data) < len(h2.PREFACE):
                self._rest = data
                return
            self._greeted, self._rest, data = True, b"", data[len(h2.PREFACE) :]
        super().data_received(data)

    def settled(self) -> None:
        self._timers.pop("handshake").cancel()

    def opened(self, flags: int, number: int, headers: Headers) -> None:
        stream = self.streams.get(number)
        if stream is not None:
            # A request's trailers: gRPC has none that mean anything.
            if not flags & h2.END_STREAM or stream.ended:
                raise Broken(h2.PROTOCOL_ERROR, "headers within a request")
            stream.ended = True
            stream.take()
            return
        if not number % 2:
            raise Broken(h2.PROTOCOL_ERROR, f"stream {number} of a client")
        if number <= self._newest:
            return  # it was closed here while this was on its way
        self._newest = number
        if self._leaving_after is not None:
            return  # the client was told that this one is not looked at
        if len(self.streams) >= self._limits.streams:
            self.write(h2.number(h2.RST_STREAM, number, h2.REFUSED_STREAM))
            return
        stream = Stream(self, number, headers)
        stream.ended = bool(flags & h2.END_STREAM)
        self.streams[number] = stream
        self._shared.calls += 1
        self._shared.begin(stream)

    def respond(self, stream: Stream, head: bytes, message: bytes, trailers: bytes) -> None:
        """All of an answer: one write where the client's windows have room, as they mostly do.

        Args:
            head, trailers: header blocks.
        """
        if stream.id not in self.streams:
            return
        number, size = stream.id, len(message)
        last = h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number, trailers)
        if size <= min(stream.window, self.window):
            self.window -= size
            self.write(
                h2.frame(h2.HEADERS, h2.END_HEADERS, number, head)
                + h2.data_frames(number, message)
                + last
            )
            self.over(stream)
            return
        stream.start(head)
        stream.send(message)
        stream.end(last)

    def over(self, stream: Stream) -> None:
        """It has been answered; what else comes on it is not wanted."""
        if self.streams.pop(stream.id, None) is not None:
            if not stream.ended:
                self.write(h2.number(h2.RST_STREAM, stream.id, h2.NO_ERROR))
            self.closed(stream)

    def closed(self, stream: Stream) -> None:
        self._shared.calls -= 1
        if stream.waiter is not None and not stream.waiter.done():
            stream.waiter.cancel()
        if self._leaving_after is not None and not self.streams:
            self.transport.close()

    def leave(self) -> None:
        """Ask the client to go: it opens nothing new, what runs is answered, 30 s at most."""
        if self._leaving or self.transport.is_closing():
            return
        self._leaving = True
        # What it sends before it reads this is still looked at: its pong comes behind that.
        self.goaway(h2.NO_ERROR, "", LAST_STREAM)
        self.write(h2.frame(h2.PING, 0, 0, _LEAVING))
        self._timer("end", _GRACE_S, self.transport.abort)

    def ponged(self, payload: bytes) -> None:
        if self._leaving and payload == _LEAVING and self._leaving_after is None:
            self._leaving_after = self._newest
            self.goaway(h2.NO_ERROR, "")
            if not self.streams:
                self.transport.close()

    def _ask(self) -> None:
        """Silent for a minute: is anybody there?"""
        if self._heard:
            self._heard = False
            self._timer("alive", _KEEPALIVE_S, self._ask)
            return
        self.write(h2.frame(h2.PING, 0, 0, b"are you?"))
        self._timer("alive", _KEEPALIVE_TIMEOUT_S, self._hang_up)

    def _hang_up(self) -> None:
        if self._heard:
            self._ask()
        else:
            self.transport.abort()

    def _timer(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        self._timers[name] = self._loop.call_later(seconds, call)

"""A small HTTP/1.1 server: h11 reads the protocol, this bounds what a client may make it hold.

A request's head has to arrive within ``head_s`` and its body within ``body_s``; both are limited in
bytes, and so are the connections. h11 refuses what is malformed. No framework: what is served are
a handful of fixed paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import h11

from fastrec.errors import ArgumentError
from fastrec.serving.wire.tls import Tls, names_of

_CHUNK = 1 << 16
_HEAD_BYTES = 16 << 10
_ERRORS = {413: "the request is too large", 503: "the server holds too many requests: try again"}
_KINDS = {"json": "application/json", "html": "text/html; charset=utf-8"}


@dataclass
class HttpRequest:
    """One request, whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    peer: str
    certificate_names: tuple[str, ...] = ()


@dataclass
class HttpReply:
    """One answer."""

    status: int = 200
    body: bytes = b""
    kind: str = _KINDS["json"]
    headers: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class HttpLimits:
    """Bounds of what clients may make the server hold.

    Args:
        message_mib: largest body, also after decompression.
        total_mib: bodies held at once, all connections together; more are refused with 503.
        head_s, body_s, idle_s: longest time for a head, for a body, and between requests.
        connections: open at once; more are closed.
    """

    message_mib: int = 16
    total_mib: int = 256
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 75.0
    connections: int = 1024


class HttpServer:
    """An HTTP/1.1 server.

    Args:
        handle: answers one request.
        address: ``HOST:PORT``; port 0 takes a free one, see :attr:`port`.
        tls: None = plain text.
        limits: bounds of what clients may make it hold.
        reuse_port: whether several processes may listen at this address.
    """

    def __init__(
        self,
        handle: Callable[[HttpRequest], Awaitable[HttpReply]],
        address: str,
        *,
        tls: Tls | None = None,
        limits: HttpLimits | None = None,
        reuse_port: bool = False,
    ) -> None:
        self._handle, self._limits, self._tls = handle, limits or HttpLimits(), tls
        self._host, _, port = address.rpartition(":")
        self._reuse_port = reuse_port
        self.port = int(port)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        # Connections whose request is being answered.
        self._busy: set[asyncio.Task[None]] = set()
        self._closing = False
        # Bytes of bodies held, by connection.
        self._held: dict[asyncio.Task[None], int] = {}

    async def start(self) -> None:
        """Listen.

        Raises:
            ArgumentError: the address cannot be listened at.
        """
        try:
            self._server = await asyncio.start_server(
                self._accept,
                self._host.strip("[]"),
                self.port,
                ssl=None if self._tls is None else self._tls.context(),
                limit=_CHUNK,
                reuse_port=self._reuse_port or None,
            )
        except OSError as error:
            address = f"{self._host}:{self.port}"
            raise ArgumentError("http address", "one that can be listened at", address) from error
        self.port = self._server.sockets[0].getsockname()[1]

    def close_after_answers(self) -> None:
        """Answer what comes on open connections, then close each; the listener stays open."""
        self._closing = True

    async def stop(self, grace_s: float = 0.0) -> None:
        """Close: idle connections at once, those with a request after ``grace_s`` at most."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        while self._connections:
            # Again and again: before Python 3.12 wait_for loses a cancellation that comes at the
            # moment it is done.
            for task in set(self._connections) - (self._busy if loop.time() < end else set()):
                task.cancel()
            await asyncio.wait(set(self._connections), timeout=0.05)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= self._limits.connections:
            writer.close()
            return
        self._connections.add(task)
        try:
            await self._talk(task, reader, writer)
        except (ConnectionError, asyncio.TimeoutError, ssl.SSLError):
            return  # the client's end; nobody is left to tell
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            writer.close()
            try:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(writer.wait_closed(), 1.0)
            finally:
                self._connections.discard(task)
                self._busy.discard(task)
                self._held.pop(task, None)

    async def _talk(
        self,
        task: asyncio.Task[None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        first = True
        while True:
            try:
                request = await self._read(task, connection, reader, writer, first)
                if request is None:
                    return
                self._busy.add(task)
                reply = await _decompressed(request, self._limits.message_mib << 20)
                if reply is None:
                    reply = await self._handle(request)
            except h11.RemoteProtocolError as error:
                if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    text = _ERRORS.get(error.error_status_hint, "malformed request")
                    reply = _error(error.error_status_hint, text)
                    reply.headers.append(("connection", "close"))
                    await self._send(connection, writer, reply, body=True)
                return
            if self._closing:
                reply.headers.append(("connection", "close"))
            await self._send(connection, writer, reply, body=request.method != "HEAD")
            self._busy.discard(task)
            self._held.pop(task, None)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()
            first = False

    async def _read(
        self,
        task: asyncio.Task[None],
        connection: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bool,
    ) -> HttpRequest | None:
        """The next request, None where the client has gone.

        Raises:
            RemoteProtocolError: malformed or too large.
            TimeoutError: too slow.
        """
        loop = asyncio.get_running_loop()
        limits = self._limits
        until = loop.time() + (limits.head_s if first else limits.idle_s)
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    proceed = h11.InformationalResponse(status_code=100, headers=[])
                    writer.write(connection.send(proceed) or b"")
                data = await asyncio.wait_for(reader.read(_CHUNK), max(0.0, until - loop.time()))
                connection.receive_data(data)
                if not first and head is None and data:
                    until, first = min(until, loop.time() + limits.head_s), True
            elif isinstance(event, h11.Request):
                head = event
                until = loop.time() + limits.body_s
                _check_length(head, limits.message_mib << 20)
            elif isinstance(event, h11.Data):
                body += event.data
                self._held[task] = len(body)
                if sum(self._held.values()) > limits.total_mib << 20:
                    del self._held[task]
                    raise h11.RemoteProtocolError("too much at once", error_status_hint=503)
                if len(body) > limits.message_mib << 20:
                    raise h11.RemoteProtocolError("too large", error_status_hint=413)
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return HttpRequest(
                    head.method.decode("ascii"),
                    head.target.decode("latin-1"),
                    {k.decode("latin-1"): v.decode("latin-1") for k, v in head.headers},
                    bytes(body),
                    _peer(writer),
                    names_of(writer.get_extra_info("peercert")),
                )
            else:  # ConnectionClosed, PAUSED
                return None

    async def _send(
        self,
        connection: h11.Connection,
        writer: asyncio.StreamWriter,
        reply: HttpReply,
        *,
        body: bool,
    ) -> None:
        headers = [
            ("content-type", reply.kind),
            ("content-length", str(len(reply.body))),
            ("x-content-type-options", "nosniff"),
            *reply.headers,
        ]
        reason = HTTPStatus(reply.status).phrase if reply.status in set(HTTPStatus) else ""
        parts = [
            connection.send(
                h11.Response(status_code=reply.status, headers=headers, reason=reason.encode())
            )
        ]
        if body:
            parts.append(connection.send(h11.Data(data=reply.body)))
        parts.append(connection.send(h11.EndOfMessage()))
        writer.write(b"".join(part for part in parts if part))
        # A client that does not read is given as long as one that does not send.
        await asyncio.wait_for(writer.drain(), self._limits.body_s)


def _check_length(head: h11.Request, most: int) -> None:
    names = {name for name, _ in head.headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        # Proxies may take the other one than we: two requests in one.
        raise h11.RemoteProtocolError("two lengths", error_status_hint=400)
    for name, value in head.headers:
        if name == b"content-length" and int(value) > most:
            raise h11.RemoteProtocolError("too large", error_status_hint=413)


async def _decompressed(request: HttpRequest, most: int) -> HttpReply | None:
    """Decompress the body in place; a reply where that is refused."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return None
    if encoding not in ("gzip", "deflate"):
        refused = _error(415, "content-encoding: expected gzip, deflate or identity")
        refused.headers.append(("accept-encoding", "gzip, deflate"))
        return refused
    unpack = zlib.decompressobj(31 if encoding == "gzip" else 15)
    try:
        # zlib works without the GIL.
        body = await asyncio.to_thread(unpack.decompress, request.body, most + 1)
    except zlib.error as error:
        return _error(400, f"content-encoding: not {encoding} ({error})")
    if len(body) > most:
        return _error(413, _ERRORS[413])
    if not unpack.eof:
        return _error(400, f"content-encoding: the {encoding} data ends early")
    request.body = body
    return None


def _error(status: int, text: str) -> HttpReply:
    return HttpReply(status, json.dumps({"error": text}).encode())


def _peer(writer: asyncio.StreamWriter) -> str:
    """As gRPC writes it."""
    address = writer.get_extra_info("peername")
    if not isinstance(address, tuple):
        return ""
    kind = "ipv6" if ":" in address[0] else "ipv4"
    return f"{kind}:[{address[0]}]:{address[1]}"

"""gRPC's calls on the streams of :mod:`.connection`.

Written because grpc.aio's share of a small request was larger than the model's: three threads hand
each call on, and a refusal costs as much as an answer. Here a call is read, answered and written in
the event loop's thread. Handlers are registered as gRPC's own are
(``method_handlers_generic_handler``); a unary one may also raise before it returns its awaitable.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import logging
import socket
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import grpc

from fastrec.errors import ArgumentError
from fastrec.serving.wire import frames as h2
from fastrec.serving.wire.connection import Connection, Shared
from fastrec.serving.wire.frames import Headers, encoded
from fastrec.serving.wire.http2 import Stream
from fastrec.serving.wire.tls import Tls, names_of

if TYPE_CHECKING:
    from fastrec.serving.wire.grpc_server import Limits

_LOG = logging.getLogger("fastrec.serving")
_PREFIX = 5
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_MOST_QUEUED = 64
_MOST_TEXT = 2048
_MOST_KNOWN = 1024

_TYPE = ("content-type", "application/grpc")
_HEAD = encoded((_TYPE, ("grpc-accept-encoding", "identity,deflate,gzip")), 200)
_WELL = encoded((("grpc-status", "0"),))
_Trailers = Iterable[tuple[str, str | bytes]]


class Aborted(Exception):
    """The call ends with a status."""

    def __init__(self, code: grpc.StatusCode, text: str, trailers: _Trailers = ()) -> None:
        self.code, self.text, self.trailers = code, text, trailers
        super().__init__(text)


class Call(NamedTuple):
    """What a request's headers say."""

    path: str
    metadata: tuple[tuple[str, str | bytes], ...]
    timeout_s: float | None
    encoding: str
    wrong: str


class _Details(NamedTuple):
    """What gRPC's generic handlers are asked with."""

    method: str
    invocation_metadata: tuple[Any, ...] = ()


class Context:
    """A handler's view of its call, as ``grpc.aio.ServicerContext``."""

    __slots__ = ("_call", "_deadline", "_transport")

    def __init__(self, call: Call, transport: asyncio.BaseTransport) -> None:
        self._call, self._transport = call, transport
        timeout = call.timeout_s
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Of the caller; names that end with ``-bin`` have bytes."""
        return self._call.metadata

    def time_remaining(self) -> float | None:
        """Until the caller's own deadline, in seconds; None where it has none."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def peer(self) -> str:
        """The caller's address."""
        address = self._transport.get_extra_info("peername")
        if not isinstance(address, tuple):
            return "unix:"
        if ":" in address[0]:
            return f"ipv6:[{address[0]}]:{address[1]}"
        return f"ipv4:{address[0]}:{address[1]}"

    def auth_context(self) -> dict[str, list[bytes]]:
        """Names of a verified client certificate."""
        names = names_of(self._transport.get_extra_info("peercert"))
        return {"x509_subject_alternative_name": [n.encode() for n in names]} if names else {}

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: _Trailers = ()
    ) -> None:
        """End the call with a status, as gRPC's own context does it."""
        self.refuse(code, details, trailing_metadata)

    def refuse(self, code: grpc.StatusCode, text: str, trailers: _Trailers = ()) -> NoReturn:
        """End the call with a status.

        Raises:
            Aborted: always.
        """
        raise Aborted(code, text, trailers)


class GrpcHost:
    """Listens at ``HOST:PORT``; port 0 takes a free one, see :attr:`port`.

    Args:
        handlers: gRPC's generic handlers, asked in this order for each path.

    Raises:
        ArgumentError: the address cannot be listened at, or TLS files are no good.
    """

    def __init__(
        self,
        handlers: Sequence[grpc.GenericRpcHandler],
        address: str,
        limits: Limits,
        *,
        tls: Tls | None = None,
        reuse_port: bool = False,
    ) -> None:
        self._handlers, self._limits = handlers, limits
        self._most = limits.message_mib << 20
        self._ssl = None if tls is None else tls.context()
        if self._ssl is not None:
            self._ssl.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server(
                (host, int(port)), family=family, backlog=1024, reuse_port=reuse_port
            )
        except (OSError, ValueError) as error:
            raise ArgumentError("address", "one that can be listened at", address) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._shared = Shared(limits, self._begin)
        self._server: asyncio.Server | None = None
        self._known: dict[str, Any] = {}
        self._calls: dict[Headers, Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        self._server = await self._loop.create_server(
            lambda: Connection(self._shared),
            sock=self._socket,
            ssl=self._ssl,
            ssl_handshake_timeout=None if self._ssl is None else 10.0,
        )

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take nothing new, give what runs ``grace_s``, close."""
        if self._server is None:
            self._socket.close()
            return
        self._server.close()
        for connection in list(self._shared.connections):
            connection.leave()
        end = time.monotonic() + grace_s
        while self._shared.calls and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for connection in list(self._shared.connections):
            connection.transport.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- a call comes in

    def _begin(self, stream: Stream) -> None:
        call = self._calls.get(stream.headers)
        if call is None:
            call = _call_of(stream.headers)
            if len(self._calls) >= _MOST_KNOWN:
                self._calls.clear()
            self._calls[stream.headers] = call
        if call.wrong:
            stream.start(encoded((), 415 if call.wrong == "content-type" else 400))
            stream.link.reset(stream, h2.NO_ERROR)
            return
        try:
            handler = self._handler(call.path)
            if handler is None:
                raise Aborted(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            if self._shared.calls > self._limits.rpcs:
                text = "Concurrent RPC limit exceeded!"
                raise Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        except Aborted as status:
            self._abort(stream, status)
            return
        context = Context(call, stream.link.transport)
        if handler.request_streaming:
            queue: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_QUEUED)
            stream.take = partial(self._take_all, stream, call, queue)
            self._run(stream, self._stream(stream, handler, context, _messages(queue, handler)))
        else:
            stream.take = partial(self._take_one, stream, call, handler, context)
        if stream.ended:
            stream.take()

    def _handler(self, path: str) -> Any:
        known = self._known.get(path)
        if known is not None:
            return known
        for generic in self._handlers:
            found = generic.service(_Details(path))
            if found is not None:
                self._known[path] = found
                return found
        return None

    def _take_one(self, stream: Stream, call: Call, handler: Any, context: Context) -> None:
        """Of a call with one request: begin once it is whole."""
        try:
            data = self._message(stream, call)
            if not stream.ended:
                return
            if data is None or stream.body:
                raise Aborted(grpc.StatusCode.INTERNAL, "not one whole message")
        except Aborted as status:
            self._abort(stream, status)
            return
        if handler.response_streaming:
            self._run(stream, self._stream(stream, handler, context, data))
            return
        try:
            read = handler.request_deserializer
            work = handler.unary_unary(data if read is None else read(data), context)
        except Exception as error:
            self._failed(stream, error)  # refused at once: no task is needed for that
            return
        task = self._run(stream, self._unary(stream, work, handler.response_serializer))
        # A task that is cancelled before it begins has never awaited it.
        task.add_done_callback(lambda _: work.close())

    def _take_all(self, stream: Stream, call: Call, queue: asyncio.Queue[bytes | None]) -> None:
        """Of a call with a stream of requests."""
        try:
            while (data := self._message(stream, call, whole=False)) is not None:
                queue.put_nowait(data)
            if stream.ended:
                queue.put_nowait(None)
        except asyncio.QueueFull:
            self._abort(stream, Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many messages"))
        except Aborted as status:
            self._abort(stream, status)

    def _message(self, stream: Stream, call: Call, *, whole: bool = True) -> bytes | None:
        """The next message of a stream; None where it is not there yet.

        Args:
            whole: whether nothing is taken before the stream has ended.

        Raises:
            Aborted: it is too long, or compressed in a way that we do not read.
        """
        body = stream.body
        if len(body) < _PREFIX:
            return None
        size = int.from_bytes(body[1:_PREFIX], "big")
        if size > self._most:
            raise _too_long(size, self._most)
        if len(body) < _PREFIX + size or (whole and not stream.ended):
            return None
        compressed, data = body[0], bytes(body[_PREFIX : _PREFIX + size])
        del body[: _PREFIX + size]
        return _inflated(data, call.encoding, self._most) if compressed else data

    # --- and its answer goes out

    def _run(self, stream: Stream, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        stream.gone = task.cancel
        return task

    async def _unary(self, stream: Stream, work: Any, written: Any) -> None:
        try:
            reply = await work
            message = reply if written is None else written(reply)
        except Exception as error:
            self._failed(stream, error)
            return
        message = b"\x00" + len(message).to_bytes(4, "big") + message
        cast(Connection, stream.link).respond(stream, _HEAD, message, _WELL)

    async def _stream(self, stream: Stream, handler: Any, context: Context, requests: Any) -> None:
        try:
            read, written = handler.request_deserializer, handler.response_serializer
            if handler.request_streaming:
                replies = handler.stream_stream(requests, context)
            else:
                replies = handler.unary_stream(
                    requests if read is None else read(requests), context
                )
            async for reply in replies:
                message = reply if written is None else written(reply)
                if not stream.said:
                    stream.start(_HEAD)
                stream.send(b"\x00" + len(message).to_bytes(4, "big") + message)
                await stream.drained()
        except Exception as error:
            self._failed(stream, error)
            return
        if not stream.said:
            stream.start(_HEAD)
        stream.end(_last(stream, _WELL))

    def _failed(self, stream: Stream, error: Exception) -> None:
        if not isinstance(error, Aborted):
            # Handlers tell their errors; this one did not.
            _LOG.error("a call failed", exc_info=error)
            error = Aborted(grpc.StatusCode.INTERNAL, "internal error")
        self._abort(stream, error)

    def _abort(self, stream: Stream, status: Aborted) -> None:
        if stream.id in stream.link.streams:
            block = _status(status.code, status.text, tuple(status.trailers or ()), stream.said)
            stream.end(_last(stream, block))


@functools.lru_cache(1024)
def _status(
    code: grpc.StatusCode, text: str, trailers: tuple[tuple[str, str | bytes], ...], said: bool
) -> bytes:
    """The header block that ends a call; ``said``: behind others."""
    headers = [("grpc-status", str(code.value[0]))]
    if text:
        headers.append(("grpc-message", _escaped(text)))
    for name, value in trailers:
        if isinstance(value, bytes):
            value = base64.b64encode(value).rstrip(b"=").decode()
        headers.append((name, value))
    return encoded(headers) if said else encoded((_TYPE, *headers), 200)


def _last(stream: Stream, block: bytes) -> bytes:
    return h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream.id, block)


async def _messages(queue: asyncio.Queue[bytes | None], handler: Any) -> AsyncIterator[Any]:
    read = handler.request_deserializer
    while (data := await queue.get()) is not None:
        yield data if read is None else read(data)


def _call_of(headers: Headers) -> Call:
    path, encoding, wrong = "", "identity", "content-type"
    timeout: float | None = None
    metadata: list[tuple[str, str | bytes]] = []
    method = ""
    for name, value in headers:
        if name == ":path":
            path = value
        elif name == ":method":
            method = value
        elif name == "content-type":
            wrong = "" if value.startswith("application/grpc") else wrong
        elif name == "grpc-timeout":
            digits, unit = value[:-1], value[-1:]
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 8 and unit in _UNITS):
                return Call(path, (), None, encoding, "grpc-timeout")
            timeout = int(digits) * _UNITS[unit]
        elif name == "grpc-encoding":
            encoding = value
        elif name.endswith("-bin"):
            try:
                text = value.encode("latin-1")
                metadata.append((name, base64.b64decode(text + b"=" * (-len(text) % 4))))
            except binascii.Error:
                return Call(path, (), None, encoding, name)
        elif not name.startswith((":", "grpc-")) and name != "te":
            metadata.append((name, value))
    if method != "POST" or not path:
        wrong = wrong or "method"
    return Call(path, tuple(metadata), timeout, encoding, wrong)


def _inflated(data: bytes, encoding: str, most: int) -> bytes:
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        text = f"grpc-encoding: expected gzip, deflate or identity, got {encoding[:64]!r}"
        raise Aborted(grpc.StatusCode.UNIMPLEMENTED, text)
    inflate = zlib.decompressobj(bits)
    try:
        found = inflate.decompress(data, most + 1)
    except zlib.error:
        raise Aborted(grpc.StatusCode.INTERNAL, f"a message that is no {encoding}") from None
    if len(found) > most:
        raise _too_long(len(found), most)
    if not inflate.eof:
        raise Aborted(grpc.StatusCode.INTERNAL, f"a message that is no {encoding}")
    return found


def _too_long(size: int, most: int) -> Aborted:
    text = f"a message of {size} bytes or more; expected at most {most}"
    return Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, text)


def _escaped(text: str) -> str:
    """As gRPC carries status texts: percent-encoded UTF-8."""
    return "".join(
        [
            chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
            for byte in text[:_MOST_TEXT].encode("utf-8", "replace")
        ]
    )

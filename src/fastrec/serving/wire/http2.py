"""HTTP/2 on asyncio: links, their streams and windows. What the two ends of a link add is in
:mod:`.connection` (servers) and :mod:`fastrec.serving.load.caller`.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from typing import cast

from fastrec.serving.wire import frames as h2
from fastrec.serving.wire.frames import Broken, Headers

STREAM_WINDOW = 1 << 20
LINK_WINDOW = 16 << 20
LAST_STREAM = 2**31 - 1
_HEADERS_BYTES = 16 << 10
_UINT32 = struct.Struct(">I")


class Stream:
    """One call.

    Attributes:
        headers: the first that came, in order.
        body: what came and is not taken yet.
        ended: whether the peer has sent all.
        said: whether our headers are sent.
        take: called when ``body`` has grown or ``ended`` was set.
        gone: called once when the peer resets the stream or goes away.
        out: what waits for room in the peer's windows.
    """

    __slots__ = (
        "body",
        "ended",
        "gone",
        "headers",
        "id",
        "last",
        "link",
        "out",
        "said",
        "take",
        "took",
        "waiter",
        "window",
    )

    def __init__(self, link: Link, number: int, headers: Headers) -> None:
        self.link, self.id, self.headers = link, number, headers
        self.body = bytearray()
        self.ended = self.said = False
        self.take: Callable[[], object] = _nothing
        self.gone: Callable[[], object] = _nothing
        self.window = link.their_window
        self.took = 0  # what came since the peer was last given room
        self.out: deque[bytes] = deque()
        self.last: bytes | None = None  # the frame that ends our side, behind ``out``
        self.waiter: asyncio.Future[None] | None = None

    def start(self, head: bytes) -> None:
        """Our headers."""
        self.said = True
        self.link.write(h2.frame(h2.HEADERS, h2.END_HEADERS, self.id, head))

    def send(self, data: bytes) -> None:
        """Data, as far as there is room; the rest when there is."""
        self.out.append(data)
        self.link.pump(self)

    def end(self, last: bytes) -> None:
        """The frame that ends our side, behind what still waits."""
        self.last = last
        self.link.pump(self)

    async def drained(self) -> None:
        """Wait until all that was sent is written."""
        if self.out:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter


def _nothing() -> None:
    """For streams nobody waits for."""


class Link(asyncio.Protocol):
    """One end of a connection: frames, windows, settings, pings.

    Args:
        most_streams: that the peer may open.
        most_bytes: of unfinished messages, all streams together.
    """

    transport: asyncio.Transport

    def __init__(self, most_streams: int, most_bytes: int) -> None:
        self._most_streams, self._most_bytes = most_streams, most_bytes
        self.streams: dict[int, Stream] = {}
        self.window = self.their_window = h2.WINDOW
        self._reader = h2.Reader(_HEADERS_BYTES)
        self._rest = b""
        self._settled = False
        self._newest = 0  # the highest stream that was opened
        self._took = 0
        self._block: tuple[int, int, bytearray] | None = None
        self._heard = False

    # --- what an end does about it

    def opened(self, flags: int, number: int, headers: Headers) -> None:
        """A header block of a stream."""
        raise NotImplementedError

    def settled(self) -> None:
        """The peer's first settings are there."""

    def closed(self, stream: Stream) -> None:
        """A stream is in :attr:`streams` no more."""

    def ponged(self, payload: bytes) -> None:
        """An answer to a ping."""

    def told_to_go(self, last: int) -> None:
        """The peer looks at no stream after ``last``."""

    # --- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        # A peer that reads nothing gets nothing read.
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            self._parse(self._rest + data if self._rest else data)
        except Broken as error:
            self.goaway(error.code, str(error))
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        for stream in list(self.streams.values()):
            self.forget(stream)

    # --- reading

    def _parse(self, data: bytes) -> None:
        at, end = 0, len(data)
        while end - at >= h2.HEAD:
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            if size > h2.FRAME:
                raise Broken(h2.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            stop = at + h2.HEAD + size
            if stop > end:
                break
            kind, flags = data[at + 3], data[at + 4]
            number = int.from_bytes(data[at + 5 : at + h2.HEAD], "big") & LAST_STREAM
            self._frame(kind, flags, number, data[at + h2.HEAD : stop])
            at = stop
            if self.transport.is_closing():
                return
        self._rest = data[at:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if not self._settled and kind != h2.SETTINGS:
            raise Broken(h2.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and (kind != h2.CONTINUATION or number != self._block[0]):
            raise Broken(h2.PROTOCOL_ERROR, "a header block was not finished")
        if kind == h2.DATA:
            self._data(flags, number, payload)
        elif kind == h2.HEADERS:
            self._headers(flags, number, payload)
        elif kind == h2.CONTINUATION:
            self._continuation(flags, number, payload)
        elif kind == h2.WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == h2.RST_STREAM:
            self._sized(payload, 4, number > 0)
            if number > self._newest:
                raise Broken(h2.PROTOCOL_ERROR, "a reset of what was not opened")
            stream = self.streams.get(number)
            if stream is not None:
                self.forget(stream)
        elif kind == h2.SETTINGS:
            self._settings(flags, number, payload)
        elif kind == h2.PING:
            self._sized(payload, 8, not number)
            if flags & h2.ACK:
                self.ponged(payload)
            else:
                self.write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.GOAWAY:
            if len(payload) < 8 or number:
                raise Broken(h2.FRAME_SIZE_ERROR, "GOAWAY")
            self.told_to_go(_UINT32.unpack_from(payload)[0] & LAST_STREAM)
        elif kind == h2.PUSH_PROMISE:
            raise Broken(h2.PROTOCOL_ERROR, "a push")
        # PRIORITY, and kinds that we do not know, say nothing to us.

    @staticmethod
    def _sized(payload: bytes, size: int, well: bool) -> None:
        if len(payload) != size:
            raise Broken(h2.FRAME_SIZE_ERROR, f"expected {size} bytes, got {len(payload)}")
        if not well:
            raise Broken(h2.PROTOCOL_ERROR, "a frame of another stream's kind")

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = h2.unpadded(flags, payload)
        if flags & h2.WITH_PRIORITY:
            if len(payload) < 5:
                raise Broken(h2.FRAME_SIZE_ERROR, "HEADERS")
            payload = payload[5:]
        if not number:
            raise Broken(h2.PROTOCOL_ERROR, "headers of no stream")
        if flags & h2.END_HEADERS:
            self.opened(flags, number, self._reader.read(payload))
        else:
            self._block = number, flags, bytearray(payload)

    def _continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None:
            raise Broken(h2.PROTOCOL_ERROR, "more of no header block")
        _, first, block = self._block
        block += payload
        if len(block) > _HEADERS_BYTES or not payload:
            raise Broken(h2.ENHANCE_YOUR_CALM, "headers are too long")
        if flags & h2.END_HEADERS:
            self._block = None
            self.opened(first, number, self._reader.read(bytes(block)))

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        if not number or number > self._newest:
            raise Broken(h2.PROTOCOL_ERROR, "data of what was not opened")
        self._took += len(payload)
        if self._took > LINK_WINDOW // 2:
            self.write(h2.number(h2.WINDOW_UPDATE, 0, self._took))
            self._took = 0
        stream = self.streams.get(number)
        if stream is None:
            return  # it was closed here while this was on its way
        if stream.ended:
            raise Broken(h2.STREAM_CLOSED, "data after the end")
        stream.took += len(payload)
        if stream.took > STREAM_WINDOW:
            raise Broken(h2.FLOW_CONTROL_ERROR, "more data than there was room for")
        stream.body += h2.unpadded(flags, payload)
        if flags & h2.END_STREAM:
            stream.ended = True
        elif stream.took > STREAM_WINDOW // 2:
            # Whoever takes the body bounds its messages; here all streams together are bounded.
            if sum([len(s.body) for s in self.streams.values()]) > self._most_bytes:
                raise Broken(h2.ENHANCE_YOUR_CALM, "too much is unfinished")
            self.write(h2.number(h2.WINDOW_UPDATE, number, stream.took))
            stream.took = 0
        stream.take()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) % 6 or (flags & h2.ACK and payload):
            raise Broken(h2.FRAME_SIZE_ERROR, "SETTINGS")
        if flags & h2.ACK:
            return
        for key, value in struct.iter_unpack(">HI", payload):
            if key == h2.INITIAL_WINDOW:
                if value > LAST_STREAM:
                    raise Broken(h2.FLOW_CONTROL_ERROR, "SETTINGS")
                change, self.their_window = value - self.their_window, value
                for stream in list(self.streams.values()):
                    stream.window += change
                    self.pump(stream)
        self.write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        if not self._settled:
            self._settled = True
            self.settled()

    def _window_update(self, number: int, payload: bytes) -> None:
        self._sized(payload, 4, True)
        room = _UINT32.unpack(payload)[0] & LAST_STREAM
        if not room:
            raise Broken(h2.PROTOCOL_ERROR, "room for nothing")
        if not number:
            self.window += room
            if self.window > LAST_STREAM:
                raise Broken(h2.FLOW_CONTROL_ERROR, "WINDOW_UPDATE")
            for waiting in [s for s in self.streams.values() if s.out]:
                self.pump(waiting)
            return
        stream = self.streams.get(number)
        if stream is not None:
            stream.window += room
            if stream.window > LAST_STREAM:
                raise Broken(h2.FLOW_CONTROL_ERROR, "WINDOW_UPDATE")
            self.pump(stream)

    # --- writing

    def greeting(self) -> bytes:
        """Our settings, and room for all streams together."""
        settings = {
            h2.HEADER_TABLE_SIZE: 0,
            h2.MAX_STREAMS: self._most_streams,
            h2.INITIAL_WINDOW: STREAM_WINDOW,
            h2.MAX_HEADERS: _HEADERS_BYTES,
        }
        return h2.settings(settings) + h2.number(h2.WINDOW_UPDATE, 0, LINK_WINDOW - h2.WINDOW)

    def write(self, data: bytes) -> None:
        """Frames to the peer."""
        self.transport.write(data)

    def pump(self, stream: Stream) -> None:
        """Write what waits on a stream, as far as both windows have room."""
        out = stream.out
        while out:
            data = out[0]
            room = min(stream.window, self.window)
            if room < len(data):
                if room <= 0:
                    return
                out[0], data = data[room:], data[:room]
            else:
                out.popleft()
            stream.window -= len(data)
            self.window -= len(data)
            self.write(h2.data_frames(stream.id, data))
        if stream.waiter is not None and not stream.waiter.done():
            stream.waiter.set_result(None)
        if stream.last is not None:
            self.write(stream.last)
            self.over(stream)

    def over(self, stream: Stream) -> None:
        """Our side of a stream has ended."""
        stream.last = None

    def reset(self, stream: Stream, code: int) -> None:
        """End both sides of a stream."""
        if self.streams.pop(stream.id, None) is not None:
            self.write(h2.number(h2.RST_STREAM, stream.id, code))
            self.closed(stream)

    def forget(self, stream: Stream) -> None:
        """The peer has given a stream up."""
        if self.streams.pop(stream.id, None) is not None:
            self.closed(stream)
            stream.gone()

    def goaway(self, code: int, why: str, last: int | None = None) -> None:
        """Say that no stream after ``last`` (None: after those that came) is looked at."""
        told = _UINT32.pack(self._newest if last is None else last) + _UINT32.pack(code)
        self.write(h2.frame(h2.GOAWAY, 0, 0, told + why.encode()[:200]))

"""HTTP/2's frames and header blocks (RFC 9113, RFC 7541): bytes to numbers and back, no state but
HPACK's.

We ask peers for a header table of size 0. The header blocks of calls that look alike are then equal
bytes, and what one of them says is looked up instead of decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from fastrec.errors import MissingDependencyError

try:
    from hpack import Decoder
    from hpack.exceptions import HPACKError
except ImportError as error:
    raise MissingDependencyError("hpack", "serve", "serving over gRPC") from error

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = 9
FRAME = 16_384  # largest payload we take, and the least that every peer takes
WINDOW = 65_535  # what a sender may send before it is told otherwise

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL = 5, 6, 7, 8
COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 9, 11

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADERS = range(1, 7)

Headers = tuple[tuple[str, str], ...]

_HEAD = struct.Struct(">HBBBI")
_MOST_KNOWN, _LONGEST_KNOWN = 1024, 1024
# By the size that the table could have, and the block.
_known: dict[tuple[int, bytes], Headers] = {}


class Broken(Exception):
    """The peer does not keep to the protocol; the connection ends with ``code``."""

    def __init__(self, code: int, why: str) -> None:
        self.code = code
        super().__init__(why)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join([struct.pack(">HI", *item) for item in values.items()]))


def number(kind: int, stream: int, value: int) -> bytes:
    """A WINDOW_UPDATE or RST_STREAM frame: their payload is one number."""
    return frame(kind, 0, stream, value.to_bytes(4, "big"))


def data_frames(stream: int, data: bytes) -> bytes:
    """DATA frames of at most :data:`FRAME` bytes."""
    if len(data) <= FRAME:
        return frame(DATA, 0, stream, data)
    return b"".join(
        [frame(DATA, 0, stream, data[i : i + FRAME]) for i in range(0, len(data), FRAME)]
    )


def unpadded(flags: int, payload: bytes) -> bytes:
    """The payload of a DATA or HEADERS frame without its padding.

    Raises:
        Broken: there is more padding than payload.
    """
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Broken(PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]


def encoded(headers: Iterable[tuple[str, str]], status: int | None = None) -> bytes:
    """A header block of literals that no table holds: any peer reads it, and it has no state."""
    block = bytearray(b"\x88" if status == 200 else b"")
    if status not in (None, 200):
        block += b"\x08" + _text(str(status).encode())
    for name, value in headers:
        block += b"\x00" + _text(name.encode("ascii")) + _text(value.encode("latin-1"))
    return bytes(block)


def _text(value: bytes) -> bytes:
    size = len(value)
    if size < 127:
        return bytes((size,)) + value
    size -= 127
    prefix = bytearray(b"\x7f")
    while size >= 128:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + value


class Reader:
    """Reads the header blocks of one connection, in the order they come.

    Args:
        most: bytes of names and values that a block may hold.
    """

    def __init__(self, most: int) -> None:
        self._decoder = Decoder(most)

    def read(self, block: bytes) -> Headers:
        """The headers, in order.

        Raises:
            Broken: it cannot be decoded; nothing after it can.
        """
        table = self._decoder.header_table.dynamic_entries
        key = self._decoder.header_table_size, block
        if not table:
            # Blocks are kept that neither read nor changed a table: any connection whose table is
            # empty, and could be as large, reads them so.
            known = _known.get(key)
            if known is not None:
                return known
        try:
            raw = self._decoder.decode(block, raw=True)
        except (HPACKError, ValueError, IndexError) as error:
            raise Broken(COMPRESSION_ERROR, str(error)) from error
        headers = tuple([(n.decode("latin-1"), v.decode("latin-1")) for n, v in raw])
        sizes_table = bool(block) and block[0] & 0xE0 == 0x20
        if not table and not sizes_table and len(block) <= _LONGEST_KNOWN:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[key] = headers
        return headers

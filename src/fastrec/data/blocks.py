"""Text files cut into blocks of whole lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastrec.data.streams import ByteStream
from fastrec.errors import DataError

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, each ended by ``\\n``; ``first_line`` counts from 1."""

    data: bytes
    first_line: int
    n_lines: int


def read_blocks(
    stream: ByteStream, *, skip_lines: int = 0, quoted: bool = False, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Blocks of about ``block_bytes``, cut after a line end; a missing last one is added.

    Args:
        stream: the file.
        skip_lines: lines at the start that are no rows (a header).
        quoted: a line end between double quotes is no line end.
        block_bytes: bytes of a block; more where a line is longer.

    Raises:
        DataError: a line of more than ``MAX_LINE_BYTES``.
    """
    first_line, rest = 1, b""
    while True:
        chunk = stream.read(block_bytes)
        data = rest + chunk
        if chunk:
            cut = _cut(data, quoted)
            data, rest = data[:cut], data[cut:]
            if len(rest) > MAX_LINE_BYTES and (cut == 0 or b"\n" not in rest):
                line = first_line + data.count(b"\n")
                limit = f"{MAX_LINE_BYTES:,} bytes"
                raise DataError(
                    f"{stream.file.name}:{line}: a line of more than {limit} is no log row"
                )
        else:
            rest = b""
            if data and not data.endswith(b"\n"):
                data += b"\n"
        while skip_lines and data:
            data = data[data.find(b"\n") + 1 :]
            skip_lines, first_line = skip_lines - 1, first_line + 1
        n_lines = data.count(b"\n")
        block = Block(data, first_line, n_lines)
        if len(data) > 2 * block_bytes:  # the sample, where blocks are small
            yield from cut_block(block, block_bytes, quoted=quoted)
        elif data:
            yield block
        first_line += n_lines
        if not chunk:
            return


def cut_block(block: Block, max_bytes: int, *, quoted: bool) -> Iterator[Block]:
    """The block, in parts of about ``max_bytes`` where it is longer."""
    data, first_line = block.data, block.first_line
    while data:
        cut = len(data)
        if cut > max_bytes:
            cut = _cut(data[:max_bytes], quoted) or data.find(b"\n") + 1
        n_lines = data.count(b"\n", 0, cut)
        yield Block(data[:cut], first_line, n_lines)
        data, first_line = data[cut:], first_line + n_lines


def _cut(data: bytes, quoted: bool) -> int:
    """Where the last whole line of ``data`` ends. With quotes: the last line end outside of them,
    or the last line end where there is none nearby (a quote that is not closed)."""
    last = data.rfind(b"\n") + 1
    if not quoted:
        return last
    cut, quotes = last, data.count(b'"', 0, last)
    while quotes % 2 and cut and last - cut < MAX_LINE_BYTES:
        previous = data.rfind(b"\n", 0, cut - 1) + 1
        quotes -= data.count(b'"', previous, cut)
        cut = previous
    return cut if quotes % 2 == 0 else last


def split_line(line: str, delimiter: str) -> list[str]:
    """Fields of a line without quotes; a delimiter of a space stands for any white space."""
    return line.split() if delimiter == " " else line.split(delimiter)

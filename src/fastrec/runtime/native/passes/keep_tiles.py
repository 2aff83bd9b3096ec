"""Keep uint8 activations in the tiles of the int8 layers."""

from __future__ import annotations

from fastrec.runtime.native.buffers import Extent
from fastrec.runtime.native.program import Program

# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: kTileChunk.
CHUNK = 32


def keep_tiles(program: Program) -> None:
    """Write uint8 activations that only int8 layers read in those layers' own layout, tiles."""
    readers = program.readers()
    for step in program.steps:
        buffer = step.y.buffer
        if step.kind not in ("linear_int8", "layer_norm") or buffer.dtype != "uint8":
            continue
        users = readers.get(buffer, [])
        if program.gives(buffer) or any(user.kind != "linear_int8" for user in users):
            continue
        if not step.y.is_whole or any(not user.x.is_whole for user in users):
            continue
        step.y_tiles = True
        for user in users:
            user.x_tiles = True
        *rows, width = buffer.shape
        # Whole chunks, of two bytes an element where the instruction set has no dot product of
        # bytes.
        padded = -(-width.coefficient // CHUNK) * CHUNK
        buffer.shape = (*rows, Extent(2 * padded))

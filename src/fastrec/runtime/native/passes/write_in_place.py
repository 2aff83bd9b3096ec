"""Write the parts of a larger buffer without a copy."""

from __future__ import annotations

from fastrec.runtime.native.program import Program


def write_in_place(program: Program) -> None:
    """Let a map whose result is copied into a part of a larger buffer write there itself."""
    for copy in list(program.steps):
        if not copy.is_copy:
            continue
        source, into = copy.x[0], copy.y
        writers = program.writers().get(source.buffer, [])
        if len(writers) != 1 or writers[0].kind != "map" or not source.is_whole:
            continue
        if source.shape != into.shape or source.buffer.space != "arena":
            continue
        if program.gives(source.buffer):
            continue
        readers = program.readers().get(source.buffer, [])
        if any(not view.is_whole for r in readers for view in r.reads(source.buffer)):
            continue
        if any(r is not copy and r.kind != "map" for r in readers):
            continue
        for reader in readers:
            for view in reader.reads(source.buffer):
                reader.replace_operand(view, into)
        writers[0].y = into
        program.steps.remove(copy)

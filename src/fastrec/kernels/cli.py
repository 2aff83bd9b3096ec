"""``fastrec tune``: launch configurations for the GPU at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def tune(
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the tables here too, with their names.")
    ] = None,
) -> None:
    """Time every launch configuration on this GPU, and keep the fastest for later calls.

    Without it, and for shapes that it does not cover, a heuristic chooses. Tables lie in the cache
    (FASTREC_CACHE_DIR, ~/.cache/fastrec); a kernel that has changed does not find old ones.
    """
    from rich.console import Console

    from fastrec.kernels._compiled import Signature
    from fastrec.kernels._cuda import cuda_can_run
    from fastrec.kernels.sparse_int8_linear import _tune

    if (reason := cuda_can_run(Signature("cuda"))) is not None:
        from fastrec.errors import BackendError

        raise BackendError(f"fastrec tune: {reason}")
    console = Console(stderr=True)
    shapes = _tune.shapes()
    for number, shape in enumerate(shapes, 1):
        with console.status(f"{number} of {len(shapes)}: sparse_int8_linear, {shape}"):
            line = _tune.tune(shape)
        console.print(line, highlight=False)
    table = _tune.table()
    console.print(f"[green]{table.path}[/]")
    if json_out is not None:
        json_out.write_text(json.dumps({table.path.name: table.content()}, indent=1) + "\n")

"""``fastrec tune``: launch configurations for the GPU at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastrec.terminal import JsonOption, progress, stderr, write_json

if TYPE_CHECKING:
    from fastrec.runtime.cuda.executor import Executor


def tune(
    model: Annotated[
        Path | None,
        typer.Argument(help="A saved ranker (fastrec.save), whose tower is tuned too."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Users of a request, for MODEL.")] = "1,8,64",
    candidates: Annotated[int, typer.Option(help="Candidates of a request, for MODEL.")] = 50,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; MODEL's own by default.")
    ] = None,
    json_out: JsonOption = None,
) -> None:
    """Time every launch configuration on this GPU, and keep the fastest for later calls.

    Without it, and for shapes that it does not cover, a heuristic chooses. Tables lie in the cache
    (FASTREC_CACHE_DIR, ~/.cache/fastrec); a kernel that has changed does not find old ones.
    """
    from fastrec.errors import ArgumentError, BackendError
    from fastrec.kernels._compiled import Signature
    from fastrec.kernels._cuda import cuda_can_run
    from fastrec.kernels.sparse_int8_linear import _tune

    if (reason := cuda_can_run(Signature("cuda"))) is not None:
        raise BackendError(f"fastrec tune: {reason}")
    try:
        users = [int(part) for part in batches.split(",")]
    except ValueError:
        users = []
    if not users or min(users) < 1:
        raise ArgumentError("batches", "numbers of 1 or more, with commas", batches)
    console = stderr()
    shapes = _tune.shapes()
    with progress() as tell:
        for number, shape in enumerate(shapes):
            tell(f"sparse_int8_linear, {shape}", number, len(shapes))
            tell.console.print(_tune.tune(shape))
    tables = [_tune.table()]
    if model is not None:
        import fastrec
        from fastrec.compress import load
        from fastrec.exporters.model_spec import spec_of
        from fastrec.runtime.cuda import tuning

        loaded = load(model)
        examples = spec_of(loaded, ()).sample({"B": users[0], "m": candidates})
        engine = fastrec.compile(loaded, examples, "cuda", precision=precision)
        executor: Executor = engine._executor  # type: ignore[attr-defined]
        with progress() as tell:
            for number, count in enumerate(users):
                tell(f"the tower, {count} users", number, len(users))
                tell.console.print(tuning.tune_tower(executor, count, candidates))
        if (tower := tuning.table(executor.device)) is not None:
            tables.append(tower)
    for table in tables:
        console.print(str(table.path), style="green")
    write_json(json_out, {table.path.name: table.content() for table in tables})

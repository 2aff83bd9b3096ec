"""``fastrec info`` and ``fastrec explain``: which kernels run here, and why the others do not."""

from __future__ import annotations

import importlib.util
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import fastrec
from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, install_command, not_installed
from fastrec.kernels import _cuda
from fastrec.kernels._compiled import Signature, reason_missing
from fastrec.measure.packages import EXTRAS, package_versions
from fastrec.model_source import ExampleOption, example_inputs, find_model
from fastrec.plotting import check_png, png
from fastrec.terminal import JsonOption, stdout, write_json

if TYPE_CHECKING:
    from fastrec.kernels._registry import OpSpec

CUDA_LOADERS = {"compiled": "compiled", "cupy": "compiled by CuPy at first use"}

# The request that a model is explained on, and how often it is timed.
_CANDIDATES, _PROFILED_CALLS = 50, 30


def collect() -> dict[str, Any]:
    """Versions, instruction sets and per op the kernel that runs, or why none does."""
    extras = {name: extra for extra, names in EXTRAS.items() for name in names}
    versions = package_versions(*extras)
    packages = {
        name: {"version": versions.get(name), "extra": extra} for name, extra in extras.items()
    }
    reason = reason_missing()
    return {
        "fastrec": fastrec.__version__,
        "python": platform.python_version(),
        "packages": packages,
        "compiled": {"available": reason is None, "why": reason},
        "isa": None
        if reason
        else {
            "active": kernels.active_isa(),
            "known": {
                name: name in kernels.available_isas() or "this CPU or its system lacks it"
                for name in kernels.isa_names()
            },
        },
        "threads": None if reason else kernels.num_threads(),
        "cuda": {"loaded_by": _cuda.loader(), "why": _cuda.reason_missing()},
        "ops": _ops(),
    }


def _ops() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        why = not_installed("torch", "torch")
        return {op_id: {"why": why} for op_id in kernels.OP_IDS}
    ops = {}
    for op_id, spec in kernels.registry().items():
        backends = {
            name: can_run(Signature("cpu")) or "runs"
            for name, can_run in spec.backends.can_run.items()
        }
        chosen = spec.backends.choose(Signature("cpu"))
        isa = spec.kernel_isa() if chosen == "cpu" else None
        ops[op_id] = {"chosen": chosen, "isa": isa, "backends": backends, "is": spec.summary}
    return ops


def c_flags() -> str:
    """Flags that compile and link a C or C++ program with the engine.

    Raises:
        BackendError: ``libfastrec.so`` is missing.
    """
    package = Path(fastrec.__file__).parent
    library = package / "lib"
    if not (library / "libfastrec.so").is_file():
        raise BackendError(f"no libfastrec.so in {library}: {reason_missing() or 'Linux has one'}")
    flags = (f"-I{package / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}", "-lfastrec")
    return shlex.join(flags)


def info(
    flags: Annotated[
        bool,
        typer.Option(
            "--c-flags", help="Print only what a C or C++ compiler needs to embed engines."
        ),
    ] = False,
    json_out: JsonOption = None,
) -> None:
    """Show which kernels are active here and why the others are not."""
    if flags:
        typer.echo(c_flags())
        return
    found = collect()
    console = stdout()
    console.print(f"fastrec {found['fastrec']}, Python {found['python']}")
    if found["isa"] is None:
        console.print(f"no compiled kernels: {found['compiled']['why']}", style="yellow")
    else:
        console.print(f"instruction set {found['isa']['active']}, {found['threads']} threads")
    if (how := found["cuda"]["loaded_by"]) is None:
        console.print(f"no CUDA kernels: {found['cuda']['why']}", style="yellow")
    else:
        console.print(f"CUDA kernels: {CUDA_LOADERS[how]}")
    ops = Table("op", "runs on", "what it is")
    for op_id, row in found["ops"].items():
        where = row.get("why") or "/".join(filter(None, (row["chosen"], row["isa"])))
        ops.add_row(op_id, where, row.get("is", ""))
    console.print(ops)
    packages = Table("package", "version", "extra")
    for name, row in found["packages"].items():
        packages.add_row(name, row["version"] or "not installed", row["extra"])
    console.print(packages)
    console.print(f"An extra is installed like this: {install_command('torch')}")
    write_json(json_out, found)


def explain(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint, a native engine's file, a folder of train, compress or autotune, "
            "or module:attribute; not with --op."
        ),
    ] = None,
    example: ExampleOption = None,
    op: Annotated[
        str | None, typer.Option("--op", metavar="ID", help="One op: which kernels it has here.")
    ] = None,
    json_out: JsonOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the model's profile: a .png file.")
    ] = None,
) -> None:
    """Show which kernel runs each step of a saved model, its time and share of the machine's limit;
    or which kernels an op has, and why."""
    if (model is None) == (op is None):
        raise ArgumentError("explain", "either a model's folder or --op", "both or neither")
    if plot is not None and op is not None:
        raise ArgumentError("--plot", "a model's folder", "--op, which has no profile")
    check_png("--plot", plot)
    if op is not None:
        rows = explain_op(op)
        table = Table("backend", "instruction set", "runs", "why")
        for row in rows:
            table.add_row(row["backend"], row["isa"], row["runs"], row["why"])
    else:
        assert model is not None
        rows, table = _explain_model(model, example, plot)
    stdout().print(table)
    write_json(json_out, rows)


def _explain_model(
    given: str, example: str | None, plot: Path | None
) -> tuple[list[dict[str, Any]], Table]:
    """The rows of a model or engine and a table of them; one request is timed, of a full history
    and 50 candidates where the model is fastrec's."""
    from fastrec.exporters.model_spec import spec_of
    from fastrec.measure.ceilings import Ceilings
    from fastrec.runtime.native.engine import PlanEngine

    source = find_model(given).announce()
    sizes = {"B": 1, "m": _CANDIDATES}
    if source.kind == "engine":
        engine: Any = source.engine()
        inputs = example_inputs(engine.spec, example, sizes, full=True)
    else:
        network = source.model()
        inputs = example_inputs(spec_of(network, ()), example, sizes, full=True)
        engine = fastrec.compile(network, inputs, backend="native")
    described: list[dict[str, Any]] = engine.describe()
    if isinstance(engine, PlanEngine):
        from fastrec.report.profile import plot_profile, table

        ceilings = Ceilings(engine.threads)
        profile = engine.profile(inputs, calls=_PROFILED_CALLS, limits=ceilings)
        if plot is not None:
            png(plot_profile(profile), plot)
        return [*profile, *(r for r in described if "module" not in r)], table(profile, ceilings)
    if plot is not None:
        why = next((r["why"] for r in described if r.get("setting") == "one plan"), "it is slower")
        raise BackendError(f"--plot: this model does not run as one plan here: {why}")
    shown = Table("module", "op", "kernel", "density", "MACs", "why")
    for row in described:
        if "module" not in row:
            continue
        density = "" if row["density"] is None else f"{row['density']:.2f}"
        macs = "" if row["macs"] is None else f"{row['macs']:,}"
        shown.add_row(row["module"], row["op"], row["kernel"], density, macs, row["why"])
    return described, shown


def explain_op(op_id: str) -> list[dict[str, str]]:
    """One row a backend, and for the compiled one a row an instruction set: what would run, and
    why or why not. ``runs`` is the instruction set of the kernel, "yes" or "no"; the choice for a
    float32 CPU tensor is marked.

    Raises:
        ArgumentError: there is no op of that name.
    """
    if op_id not in kernels.OP_IDS:
        raise ArgumentError("op", f"one of {', '.join(kernels.OP_IDS)}", op_id)
    spec = kernels.registry()[op_id]
    chosen = spec.backends.choose(Signature("cpu"))
    rows = []
    for backend, can_run in spec.backends.can_run.items():
        reason = can_run(Signature("cpu"))
        if backend == "cpu" and reason is None:
            rows += _isa_rows(spec, chosen == "cpu")
        else:
            mark = "chosen" if backend == chosen else "slower; the definition"
            runs = "yes" if reason is None else "no"
            rows.append({"backend": backend, "isa": "", "runs": runs, "why": reason or mark})
    return rows


def _isa_rows(spec: OpSpec, chosen: bool) -> list[dict[str, str]]:
    """The kernel that runs when each instruction set is the newest allowed, newest first."""
    active, present = kernels.active_isa(), kernels.available_isas()
    newest = present[-1]
    rows = []
    for name in reversed(kernels.isa_names()):
        if name not in present:
            runs, why = "no", "this CPU or its system lacks it"
        else:
            with kernels.force_isa(name):
                runs = spec.kernel_isa()
            why = "has a kernel of its own" if runs == name else f"the {runs} kernel is the newest"
        if name == active and chosen:
            why = "chosen: " + ("the newest here" if name == newest else "forced") + f"; {why}"
        rows.append({"backend": "cpu", "isa": name, "runs": runs, "why": why})
    return rows

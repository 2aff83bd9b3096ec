"""``fastrec info`` and ``fastrec explain``: which kernels run here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import fastrec
from fastrec import kernels
from fastrec.errors import BackendError
from fastrec.kernels._compiled import reason_missing

# Optional packages by the extra that brings them.
EXTRAS = {
    "torch": ("torch",),
    "data": ("polars",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "report": ("matplotlib", "psutil"),
}


def collect() -> dict[str, Any]:
    """Versions, instruction sets and per op the kernel that runs, or why none does."""
    packages = {}
    for extra, names in EXTRAS.items():
        for name in names:
            try:
                version: str | None = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            packages[name] = {"version": version, "extra": extra}
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
        "ops": _ops(),
    }


def _ops() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        why = "torch is not installed (fastrec[torch])"
        return {op_id: {"why": why} for op_id in kernels.OP_IDS}
    from fastrec.kernels._compiled import Signature

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


def info(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
) -> None:
    """Show which kernels are active here and why the others are not."""
    found = collect()
    console = Console()
    console.print(f"fastrec {found['fastrec']}, Python {found['python']}")
    if found["isa"] is None:
        console.print(f"[yellow]no compiled kernels[/]: {found['compiled']['why']}")
    else:
        console.print(f"instruction set {found['isa']['active']}, {found['threads']} threads")
    ops = Table("op", "runs on", "what it is")
    for op_id, row in found["ops"].items():
        where = row.get("why") or "/".join(filter(None, (row["chosen"], row["isa"])))
        ops.add_row(op_id, where, row.get("is", ""))
    console.print(ops)
    packages = Table("package", "version", "extra")
    for name, row in found["packages"].items():
        packages.add_row(name, row["version"] or "not installed", f"fastrec[{row['extra']}]")
    console.print(packages)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def explain(
    model: Annotated[Path, typer.Argument(help="Folder written by fastrec.save.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
) -> None:
    """Show for each module of a saved model which kernel runs it and why."""
    import torch

    loaded = fastrec.load(model)
    config: Any = getattr(loaded, "config", None)
    if not hasattr(config, "history_length"):
        raise BackendError(f"explain: expected a saved Ranker, got {type(loaded).__name__}")
    history = torch.ones(1, config.history_length, dtype=torch.int64)
    length = torch.tensor([config.history_length])
    candidates = torch.ones(1, 50, dtype=torch.int64)
    inputs = (history, history, history, length, candidates, candidates)
    rows = fastrec.compile(loaded, inputs, backend="native").describe()
    modules = [row for row in rows if "module" in row]
    table = Table("module", "op", "kernel", "density", "MACs", "why")
    for row in modules:
        density = "" if row["density"] is None else f"{row['density']:.2f}"
        macs = "" if row["macs"] is None else f"{row['macs']:,}"
        table.add_row(row["module"], row["op"], row["kernel"], density, macs, row["why"])
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")

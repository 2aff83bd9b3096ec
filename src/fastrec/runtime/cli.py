"""``fastrec export``: a saved checkpoint as ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(help="What fastrec.save wrote.")],
    out: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    history: Annotated[
        int | None, typer.Option(help="History length L; the model's longest by default.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Candidates per request, m.")] = 50,
    dynamic_batch: Annotated[
        bool, typer.Option(help="Leave batch, history and candidates free.")
    ] = True,
    sparse: Annotated[
        bool, typer.Option(help="Sparse initialisers for weights that are mostly zeros.")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write a report here.")] = None,
) -> None:
    """Export a checkpoint as ONNX: standard operators only, checked against torch."""
    from rich.console import Console

    from fastrec.compress import load
    from fastrec.compress.artifact import read_manifest
    from fastrec.runtime.model_spec import spec_of
    from fastrec.runtime.onnx_export import OPSET, onnx_versions
    from fastrec.runtime.onnx_export import export as export_onnx

    console = Console(stderr=True)
    with console.status("Exporting and checking against torch"):
        loaded = load(model)
        sizes = {"B": 2, "m": candidates} | ({} if history is None else {"L": history})
        examples = spec_of(loaded, ()).sample(sizes)
        recipe = read_manifest(model).get("recipe")
        export_onnx(
            loaded,
            out,
            examples,
            dynamic_batch=dynamic_batch,
            sparse=sparse,
            metadata=None if recipe is None else {"recipe": json.dumps(recipe)},
        )
    size_mb = out.stat().st_size / 1e6
    console.print(f"[green]{out}[/]: {size_mb:.1f} MB, opset {OPSET}, agrees with torch")
    if json_out is not None:
        report = {
            "path": str(out),
            "size_mb": size_mb,
            "opset": OPSET,
            "dynamic_batch": dynamic_batch,
            "inputs": {n: list(a.shape) for n, a in zip(_names(loaded), examples, strict=True)},
            "versions": onnx_versions(),
        }
        json_out.write_text(json.dumps(report, indent=1) + "\n")


def _names(model: object) -> tuple[str, ...]:
    from torch import nn

    from fastrec.runtime.model_spec import spec_of

    assert isinstance(model, nn.Module)
    return spec_of(model, ()).names

"""``fastrec export``: a saved checkpoint as ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrec.terminal import JsonOption, progress, stderr, write_json


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
    json_out: JsonOption = None,
) -> None:
    """Export a checkpoint as ONNX: standard operators only, checked against torch."""
    from fastrec.compress import load
    from fastrec.compress.artifact import read_manifest
    from fastrec.exporters.model_spec import spec_of
    from fastrec.exporters.onnx.export import OPSET, onnx_versions
    from fastrec.exporters.onnx.export import export as export_onnx

    with progress() as tell:
        tell("exporting and checking against torch", 0, 0)
        loaded = load(model)
        sizes = {"B": 2, "m": candidates} | ({} if history is None else {"L": history})
        spec = spec_of(loaded, ())
        examples = spec.sample(sizes)
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
    stderr().print(f"{out}: {size_mb:.1f} MB, opset {OPSET}, agrees with torch", style="green")
    report = {
        "path": str(out),
        "size_mb": size_mb,
        "opset": OPSET,
        "dynamic_batch": dynamic_batch,
        "inputs": {n: list(a.shape) for n, a in zip(spec.names, examples, strict=True)},
        "versions": onnx_versions(),
    }
    write_json(json_out, report)


def screen(
    engine: Annotated[Path, typer.Argument(help="A native engine's file.")],
    data: Annotated[Path, typer.Option(help="What `fastrec data prepare` wrote.")],
    keep: Annotated[int, typer.Option(help="Candidates that are scored in full.")] = 100,
    k: Annotated[int, typer.Option(help="Recall is about so many of the best candidates.")] = 10,
    candidates: Annotated[int, typer.Option(help="Of a request, when recall is measured.")] = 1000,
    users: Annotated[int, typer.Option(help="Users that the screen is fitted on.")] = 2000,
    json_out: JsonOption = None,
) -> None:
    """Fit a pre-ranker beside an engine's file: large requests then cost less in serving."""
    import dataclasses

    from fastrec.data import SequenceDataset
    from fastrec.runtime.artifact import load_engine
    from fastrec.runtime.screening import SUFFIX, fit, recall

    dataset = SequenceDataset.open(data)
    opened = load_engine(engine)
    try:
        length = opened.spec.limits.get("L", (1, None))[1]

        def requests(split: str, m: int, limit: int) -> Any:
            batches = dataset.batches(
                split, batch_size=16, n_candidates=m, history_length=length, limit=limit
            )
            return (batch.inputs() for batch in batches)

        with progress() as tell:
            tell("fitting on the engine's own scores", 0, 0)
            fitted = fit(opened, requests("train", 100, users))
            tell("measuring recall", 0, 0)
            report = recall(opened, fitted, requests("valid", candidates, 256), keep, k)
    finally:
        opened.close()
    path = Path(f"{engine}{SUFFIX}")
    dataclasses.replace(fitted, report=report).save(path)
    stderr().print(
        f"{path}: of the best {k} of {candidates} candidates, the {keep} kept hold "
        f"{report['recall']:.1%} (by chance {report['chance']:.1%})",
        style="green",
    )
    write_json(json_out, report)

"""``fastrec compile``, ``export`` and ``screen``: an engine, an ONNX file, a pre-ranker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrec.errors import ArgumentError
from fastrec.model_source import (
    EngineArgument,
    ExampleOption,
    ModelArgument,
    calibration_batches,
    example_inputs,
    find_model,
)
from fastrec.terminal import JsonOption, progress, stderr, write_json


def compile(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The engine to write: a file (native) or a folder.")],
    backend: Annotated[
        str, typer.Option(help="native, onnxruntime, openvino, litert, tensorrt or qnn.")
    ] = "native",
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16 or int8 by the backend itself.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads a call; all by default.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Quantise a float model to INT8 on this: a prepared data set or a .npz.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Users a call, of the examples.")] = 1,
    history: Annotated[int | None, typer.Option(min=1, help="History length L.")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates a user, m.")] = 50,
    example: ExampleOption = None,
    json_out: JsonOption = None,
) -> None:
    """Compile a model into an engine that fastrec serve, screen, loadtest and simulate open."""
    from fastrec.compress import Int8, quantize_
    from fastrec.exporters.model_spec import quantised_module, spec_of
    from fastrec.measure.timing import interleaved
    from fastrec.runtime.compiler import compile as run

    source = find_model(model).announce()
    network = source.model()
    if calibration is not None and (held := quantised_module(network)) is not None:
        raise ArgumentError("--calibration", "a float model", f"{model}: {held} is INT8 already")
    sizes = {"B": batch, "m": candidates} | ({} if history is None else {"L": history})
    examples = example_inputs(spec_of(network, ()), example, sizes, full=True)
    batches = None if calibration is None else calibration_batches(network, calibration)
    # Native runs what it is given; the others may have a quantiser of their own.
    settings = {"executor": "plan"} if backend == "native" else {}
    with progress() as tell:
        if batches is not None and precision is None:
            tell("quantising", 0, 0)
            quantize_(network, Int8(), batches)
        tell(f"compiling for {backend} and checking against torch", 0, 0)
        engine = run(
            network, examples, backend, threads,
            precision=precision, calibration=batches if precision == "int8" else None,
            settings=settings,
        )  # fmt: skip
        tell("saving", 0, 0)
        path = engine.save(out)
        tell("timing", 0, 0)
        taken = interleaved({"it": engine}, [examples], rounds=10, calls=5, seconds_budget=1.0)[
            "it"
        ]
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    report = {
        "path": str(path),
        "model": source.given,
        "kind": source.kind,
        "backend": engine.backend,
        "precision": engine.precision,
        "threads": engine.threads,
        "size_mb": sum(f.stat().st_size for f in files) / 1e6,
        "p50_ms": taken.best_round_ms,
        "batch": len(examples[0]),
    }
    engine.close()
    stderr().print(
        f"{path}: {engine.backend} {engine.precision}, {report['size_mb']:.1f} MB; "
        f"{taken.best_round_ms:.2f} ms a call of {len(examples[0])} on {engine.threads} thread(s); "
        "agrees with torch",
        style="green",
    )
    write_json(json_out, report)


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    example: ExampleOption = None,
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
    from fastrec.compress.artifact import read_manifest
    from fastrec.exporters.model_spec import as_tensors, spec_of
    from fastrec.exporters.onnx.export import OPSET, onnx_versions
    from fastrec.exporters.onnx.export import export as export_onnx

    source = find_model(model).announce()
    with progress() as tell:
        tell("exporting and checking against torch", 0, 0)
        loaded = source.model()
        sizes = {"B": 2, "m": candidates} | ({} if history is None else {"L": history})
        examples = example_inputs(spec_of(loaded, ()), example, sizes)
        names = spec_of(loaded, as_tensors("--example", examples)).names
        recipe = None
        if source.kind == "checkpoint" and source.path is not None:
            recipe = read_manifest(source.path).get("recipe")
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
        "inputs": {n: list(a.shape) for n, a in zip(names, examples, strict=True)},
        "versions": onnx_versions(),
    }
    write_json(json_out, report)


def screen(
    engine: EngineArgument,
    data: Annotated[Path, typer.Option(help="What `fastrec data prepare` wrote.")],
    keep: Annotated[int, typer.Option(help="Candidates that are scored in full.")] = 100,
    k: Annotated[int, typer.Option(help="Recall is of this many best candidates.")] = 10,
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
    where = find_model(engine).announce().engine_path()
    opened = load_engine(where)
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
    path = Path(f"{where}{SUFFIX}")
    dataclasses.replace(fitted, report=report).save(path)
    stderr().print(
        f"{path}: of the best {k} of {candidates} candidates, the {keep} kept hold "
        f"{report['recall']:.1%} (by chance {report['chance']:.1%})",
        style="green",
    )
    write_json(json_out, report)

"""Rankers in the idioms of public recommenders: native against every other runtime.

``python bench/bench_models.py --out DIR [--only NAME]``. Models and sizes: ``bench/rankers``,
random weights. Each engine is held against the torch model before it is timed; rounds interleave in
one process, ratios carry 95 % intervals. A model's row replaces the one in DIR's report, so a run
may take some models, and another one the rest; ``--page FILE`` writes the summary between that
page's markers.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

import fastrec
from fastrec.errors import FastrecError
from fastrec.measure.machine import machine_card
from fastrec.measure.timing import Samples, Tolerance, correctness_gate, interleaved, ratio
from fastrec.runtime.engine import Engine
from rankers import MODELS, Idiom, Inputs

RIVALS = ("onnxruntime", "openvino", "torch_compile", "torch")
# Their own quantisers; torch.compile has none that serves a float model as it is.
INT8_RIVALS = ("onnxruntime", "openvino")
REQUESTS = 4
EXAMPLES = 8
# Scores of this many users are compared where a precision may change a ranking.
GATE_BATCH = 50
BEGIN, END = "<!-- bench_models -->", "<!-- /bench_models -->"
GOALS = {"1": 1.0, "8": 0.95, "50": 0.95}


def quantised(model: torch.nn.Module, idiom: Idiom) -> torch.nn.Module:
    """A copy by ``fastrec.quantize_``."""
    twin = copy.deepcopy(model)
    calibration = [idiom.inputs(32, 100 + seed) for seed in range(2)]
    fastrec.quantize_(twin, fastrec.Int8(), calibration=calibration)
    return twin


def arrays(inputs: Inputs) -> tuple[np.ndarray, ...]:
    return tuple(tensor.numpy() for tensor in inputs)


def error_of(
    engine: Engine, model: torch.nn.Module, inputs: Inputs, precision: str
) -> tuple[float, str | None]:
    """The largest error relative to the largest score, and why the engine is not to be timed."""
    with torch.inference_mode():
        wanted = model(*inputs).numpy()
    found = correctness_gate(
        wanted, np.asarray(engine(*arrays(inputs))), Tolerance.for_precision(precision)
    )
    return found.relative_error, found.reason


class Cell:
    """The engines of one model, batch size and thread count that are right."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.engines: dict[str, Engine] = {}
        self.refused: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.seconds: dict[str, float] = {}  # of compiling

    def add(
        self,
        name: str,
        model: torch.nn.Module,
        base: torch.nn.Module,
        idiom: Idiom,
        backend: str,
        threads: int,
        precision: str | None = None,
    ) -> None:
        """Compile one, and hold it against ``base``."""
        quantises = {"calibration": [idiom.inputs(32, 100)]} if precision == "int8" else {}
        fallback = {"fallback": "error"} if backend == "native" else {}
        start = time.perf_counter()
        try:
            engine = fastrec.compile(
                model, idiom.inputs(self.batch, 7), backend, threads,
                precision=precision, **quantises, **fallback,
            )  # fmt: skip
            self.seconds[name] = time.perf_counter() - start
            kind = "int8" if name.endswith("int8") else "fp32"
            inputs = idiom.inputs(GATE_BATCH if kind == "int8" else self.batch, 8)
            self.errors[name], why = error_of(engine, base, inputs, kind)
        except FastrecError as error:
            self.refused[name] = str(error).splitlines()[0][:200]
            return
        if why is None:
            self.engines[name] = engine
        else:
            self.refused[name] = why

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def built(
    idiom: Idiom, model: torch.nn.Module, threads: int, rivals: list[str], int8: bool
) -> Cell:
    """All engines of a model, compiled on a batch of eight."""
    cell = Cell(EXAMPLES)
    cell.add("native", model, model, idiom, "native", threads)
    try:
        if int8:
            cell.add("native int8", quantised(model, idiom), model, idiom, "native", threads)
    except FastrecError as error:
        cell.refused["native int8"] = str(error).splitlines()[0][:200]
    for rival in rivals:
        cell.add(rival, model, model, idiom, rival, threads)
        if int8 and rival in INT8_RIVALS:
            cell.add(f"{rival} int8", model, model, idiom, rival, threads, "int8")
    return cell


def measure(cell: Cell, idiom: Idiom, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """One row: milliseconds of each engine, and native's ratios to the best rival."""
    inputs = [arrays(idiom.inputs(batch, 10 + i)) for i in range(REQUESTS)]
    # Of one thread the CPU's time counts, which a busy machine leaves alone, and nothing spins.
    alone: dict[str, Any] = {"clock": time.process_time_ns, "settle_s": 0.0} if threads == 1 else {}
    taken = interleaved(
        cell.engines, inputs, rounds=25, calls=8, warm_s=0.004, seconds_budget=seconds, **alone
    )
    row: dict[str, Any] = {
        "ms": {name: samples.p50_ms for name, samples in taken.items()},
        "errors": cell.errors,
        "refused": cell.refused,
        "compile_s": cell.seconds.get("native", float("nan")),
    }
    fp32 = [n for n in taken if not n.startswith("native") and not n.endswith("int8")]
    every = [n for n in taken if not n.startswith("native")]
    for name, against in (("native", fp32), ("native int8", every)):
        if name in taken and against:
            row[name] = _faster(taken, name, against)
    if "native" in taken and "native int8" in taken:
        gain = ratio(taken["native"], taken["native int8"])
        row["int8 over fp32"] = {"x": gain.value, "ci95": [gain.low, gain.high]}
    return row


def _faster(taken: dict[str, Samples], name: str, rivals: list[str]) -> dict[str, Any]:
    best = min(rivals, key=lambda n: taken[n].p50_ms)
    gain = ratio(taken[best], taken[name])
    return {"than": best, "x": gain.value, "ci95": [gain.low, gain.high]}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the report, which rows are added to.")],
    only: Annotated[list[str] | None, typer.Option(help="Models; all by default.")] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,50",
    threads: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2",
    rivals: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(RIVALS),
    seconds: Annotated[float, typer.Option(help="Of measuring, a row.")] = 3.0,
    int8: Annotated[bool, typer.Option(help="Measure INT8 too.")] = True,
    page: Annotated[Path | None, typer.Option(help="A page to write the summary into.")] = None,
) -> None:
    """Measure, a row a model, batch size and thread count."""
    console = Console(stderr=True)
    names = only or list(MODELS)
    if unknown := [name for name in names if name not in MODELS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected of {', '.join(MODELS)}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "models_speed.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    report["machine"] = machine_card()
    for name in names:
        torch.manual_seed(0)
        model = MODELS[name].build().eval()
        for count in map(int, threads.split(",")):
            cell = built(MODELS[name], model, count, rivals.split(","), int8)
            for batch in map(int, batches.split(",")):
                row = measure(cell, MODELS[name], batch, count, seconds)
                found = report["rows"].setdefault(name, {}).setdefault(str(count), {})
                found[str(batch)] = row | {"date": report["machine"]["date"]}
                console.print(_line(name, count, batch, row), markup=False, soft_wrap=True)
                file.write_text(json.dumps(report, indent=1) + "\n")
                gc.collect()
            cell.close()
    written(out / "models_speed.md", markdown(report))
    if page is not None:
        written(page, summary(report))


def _line(name: str, threads: int, batch: int, row: dict[str, Any]) -> str:
    times = ", ".join(f"{engine} {ms:.3f}" for engine, ms in row["ms"].items())
    gains = ", ".join(f"{n} {_gain(row, n)}" for n in ("native", "native int8"))
    return f"{name} threads={threads} B={batch}: {gains} ({times}) {row['refused'] or ''}"


def _gain(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    found = row[name]
    low, high = found["ci95"]
    return f"{found['x']:.2f}x [{low:.2f}, {high:.2f}]"


def written(page: Path, text: str) -> None:
    """Put the text between the page's markers; a new page is these alone."""
    old = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.S)
    if not pattern.search(old):
        raise typer.BadParameter(f"{page} has no {BEGIN} .. {END}")
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}{END}", old))


def _head(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"{machine['cpu']}, {', '.join(machine['isa'])}; {machine['cores_usable']} cores; "
        + ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
        + f"; {machine['date']}."
    )


def markdown(report: dict[str, Any]) -> str:
    """Every row, for people."""
    lines = [
        _head(report) + " Made by `bench/bench_models.py`; random weights; sizes in",
        "`bench/rankers`. Milliseconds are medians of interleaved rounds, with one thread of CPU",
        "time (of the whole process), so that a busy machine shows little; faster: the best",
        "rival's time over native's, with a 95 % interval (INT8: the best rival in any",
        "precision). Error: native against torch, of the largest score.",
        "",
        "| model | threads | B | native ms | faster than | | error | INT8 ms | faster than | | "
        "compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, threads, batch, row in _rows(report):
        cells = [name, threads, batch]
        for engine in ("native", "native int8"):
            ms = row["ms"].get(engine)
            why = row["refused"].get(engine, "")
            cells.append(f"{ms:.3f}" if ms else f"- {why}")
            cells += [_gain(row, engine), row.get(engine, {}).get("than", "")]
            if engine == "native":
                cells.append(f"{row['errors'].get('native', float('nan')):.0e}")
        lines.append("| " + " | ".join([*cells, f"{row['compile_s']:.1f}"]) + " |")
    return "\n".join([*lines, "", *_verdicts(report), ""])


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    return [
        (name, threads, batch, row)
        for name, found in report["rows"].items()
        for threads, of in sorted(found.items())
        for batch, row in sorted(of.items(), key=lambda item: int(item[0]))
    ]


def _verdicts(report: dict[str, Any]) -> list[str]:
    lines = []
    for batch, goal in GOALS.items():
        for threads in ("1", "2"):
            rows = [row for _, t, b, row in _rows(report) if b == batch and t == threads]
            fp32 = [row["native"]["x"] for row in rows if "native" in row]
            int8 = [row["native int8"]["x"] for row in rows if "native int8" in row]
            if fp32:
                lines.append(
                    f"- B = {batch}, {threads} threads: fp32 at least {goal:g}x in "
                    f"{sum(x >= goal for x in fp32)} of {len(fp32)}, median "
                    f"{np.median(fp32):.2f}x; INT8 at least 2x in {sum(x >= 2 for x in int8)} of "
                    f"{len(int8)}, at least 1x in {sum(x >= 1 for x in int8)}."
                )
    return lines


def summary(report: dict[str, Any]) -> str:
    """A row a model, one thread: error, fp32 and INT8 ratios at each batch size."""
    lines = [
        "| model | error | fp32, B = 1 | B = 8 | B = 50 | INT8, B = 1 | B = 8 | B = 50 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in report["rows"].items():
        of = found.get("1", {})
        worst = max((row["errors"].get("native", 0.0) for row in of.values()), default=0.0)
        cells = [name, f"{worst:.0e}"]
        for engine in ("native", "native int8"):
            for batch in GOALS:
                gain = of.get(batch, {}).get(engine)
                cells.append(f"{gain['x']:.2f}x" if gain else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # exporters' notices, one a model and engine
    typer.run(main)

"""What engines make of our export, against their own tools: engines.json, engines.md.

``python bench/bench_engines.py --kept DIR --build-only``, then, on an idle machine,
``python bench/bench_engines.py --kept DIR --out DIR``. The canonical ranker, random weights:

own tools  our INT8 (QDQ with the scales of ``fastrec.quantize_``) against the same float network
           quantised by ONNX Runtime's dynamic quantiser (its fastest, see docs/runtime.md) and by
           nncf for OpenVINO, all with the same calibration; goal: at least 0.95 times as fast
custom     ONNX Runtime with and without ``fastrec.exporters.onnx.custom_ops``, and native beside
           them, on the ranker with 40 % pruned and INT8
auto       the engine that ``backend="auto"`` takes against the best of all, over a grid of sizes
           and precisions; goal: never more than 3 % slower. A smaller item table, and no
           torch.compile: a minute of compiling a cell
export     seconds and extra memory of ``fastrec.export``, in a process of its own that has exported
           a small model before (which brings the exporter's modules); goals: 60 s, twice the model
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

import fastrec
from fastrec.exporters.model_spec import spec_of
from fastrec.measure.choice import contest
from fastrec.measure.machine import machine_card
from fastrec.measure.timing import Samples, interleaved, ratio
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime import BACKENDS, available_backends, load_engine
from fastrec.runtime.engine import Engine

RIVALS = ("onnxruntime", "openvino")
OWN_GOAL, AUTO_GOAL, EXPORT_GOAL_S, EXPORT_GOAL_X = 0.95, 1.03, 60.0, 2.0
BATCHES = (1, 8)
LEFT_OUT = ("torch_compile", "qnn")  # of the grid; auto itself leaves qnn out
GRID = [(batch, length, m) for batch in (1, 8) for length, m in ((20, 10), (100, 50))]

Request = tuple[np.ndarray, ...]


def request(model: Ranker, batch: int, seed: int, length: int = 100, m: int = 50) -> Request:
    """Random ids, full histories."""
    inputs = spec_of(model, ()).sample({"B": batch, "L": length, "m": m}, seed=seed)
    inputs[3][:] = length
    return inputs


def quantised(model: Ranker, sparsity: float = 0.0) -> Ranker:
    """A copy, by ``fastrec.prune_`` and ``fastrec.quantize_``."""
    twin = copy.deepcopy(model)
    if sparsity:
        fastrec.prune_(twin, fastrec.BlockPruning(sparsity=sparsity))
    drawn = [tuple(map(torch.from_numpy, request(model, 8, seed))) for seed in range(4)]
    fastrec.quantize_(twin, fastrec.Int8(), calibration=drawn)
    return twin


def build_own(kept: Path, threads: int) -> None:
    """Save an engine for each of ours and the rivals' own, unless it is there."""
    torch.manual_seed(0)
    base = Ranker(RankerConfig.taobao()).eval()
    ours = quantised(base)
    calibration = [request(base, 8, seed) for seed in range(4)]
    for batch in BATCHES:
        for backend in RIVALS:
            for who, model, precision in (("ours", ours, None), ("own", base, "int8")):
                folder = kept / f"{backend}-{who}-{batch}"
                if folder.is_dir() or available_backends()[backend] is not None:
                    continue
                with fastrec.compile(
                    model,
                    request(base, batch, 99),
                    backend,
                    threads,
                    precision=precision,
                    calibration=calibration if precision else None,
                ) as engine:
                    engine.save(folder)


CUSTOM = {
    "onnxruntime": ("onnxruntime", {}),
    "onnxruntime, custom ops": ("onnxruntime", {"custom_ops": "on"}),
    "native": ("native", {"executor": "plan"}),
}


def custom_folder(kept: Path, name: str, batch: int) -> Path:
    """Where an engine of :data:`CUSTOM` is kept."""
    return kept / f"pruned-{name.replace(', ', '-').replace(' ', '-')}-{batch}"


def build_custom(kept: Path, threads: int) -> None:
    """Save an engine a row and batch size, unless it is there."""
    folders = {(n, batch): custom_folder(kept, n, batch) for n in CUSTOM for batch in BATCHES}
    if all(folder.exists() for folder in folders.values()):
        return
    torch.manual_seed(0)
    base = Ranker(RankerConfig.taobao()).eval()
    model = quantised(base, 0.4)
    for (name, batch), folder in folders.items():
        backend, settings = CUSTOM[name]
        if not folder.exists():
            examples = request(base, batch, 99)
            with fastrec.compile(model, examples, backend, threads, settings=settings) as engine:
                engine.save(folder)


def in_turns(engines: dict[str, Engine], batch: int, seconds: float) -> dict[str, Samples]:
    """Times of each on the same requests; closes them."""
    base = Ranker(RankerConfig(n_items=2000, n_categories=50))  # ids that both tables have
    taken = interleaved(
        engines,
        [request(base, batch, seed) for seed in range(4)],
        rounds=40,
        calls=max(4, 16 // batch),
        warm_s=0.01,
        seconds_budget=seconds,
    )
    for engine in engines.values():
        engine.close()
    return taken


def time_custom(kept: Path, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of each, a row a batch size."""
    rows = []
    for batch in BATCHES:
        engines = {name: load_engine(custom_folder(kept, name, batch)) for name in CUSTOM}
        taken = in_turns(engines, batch, seconds)
        speed = ratio(taken["onnxruntime"], taken["onnxruntime, custom ops"])
        rows.append(
            {
                "batch": batch,
                "ms": {name: samples.p50_ms for name, samples in taken.items()},
                "speed": speed.value,
                "ci95": [speed.low, speed.high],
            }
        )
    return rows


def time_own(kept: Path, seconds: float) -> list[dict[str, Any]]:
    """Ours against the engine's own quantiser, a row a batch size and engine."""
    rows = []
    for batch in BATCHES:
        engines = {
            f"{backend} {who}": load_engine(kept / f"{backend}-{who}-{batch}")
            for backend in RIVALS
            for who in ("ours", "own")
            if (kept / f"{backend}-{who}-{batch}").is_dir()
        }
        taken = in_turns(engines, batch, seconds)
        for backend in RIVALS:
            if f"{backend} ours" not in taken:
                continue
            ours, own = taken[f"{backend} ours"], taken[f"{backend} own"]
            speed = ratio(own, ours)
            rows.append(
                {
                    "engine": backend,
                    "batch": batch,
                    "ours_ms": ours.p50_ms,
                    "own_ms": own.p50_ms,
                    "speed": speed.value,
                    "ci95": [speed.low, speed.high],
                    "goal": OWN_GOAL,
                    "verdict": "reached" if speed.value >= OWN_GOAL else "missed",
                }
            )
    return rows


def time_auto(kept: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """The choice of ``auto`` against all, measured anew and longer than the choice took. Cells lie
    in ``kept``, so that a run that was interrupted goes on."""
    torch.manual_seed(0)
    base = Ranker(RankerConfig(n_items=20_000, n_categories=500)).eval()
    rows = []
    for precision, model in (("fp32", base), ("int8", quantised(base))):
        for batch, length, m in GRID:
            cell = kept / f"auto-{precision}-{batch}-{length}-{m}.json"
            if cell.exists():
                rows.append(json.loads(cell.read_text()))
                continue
            examples = request(model, batch, 99, length, m)
            engines: dict[str, Engine] = {}
            for name in BACKENDS:
                if name not in LEFT_OUT and available_backends()[name] is None:
                    engines[name] = fastrec.compile(model, examples, name, threads)
            chosen, _ = contest(engines, tuple(map(torch.from_numpy, examples)))
            taken = interleaved(
                engines, [examples], rounds=40, calls=4, warm_s=0.005, seconds_budget=seconds
            )
            best = min(taken, key=lambda name: taken[name].quiet_ms)
            slower = taken[chosen].quiet_ms / taken[best].quiet_ms
            rows.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "length": length,
                    "candidates": m,
                    "ms": {name: samples.quiet_ms for name, samples in taken.items()},
                    "chosen": chosen,
                    "best": best,
                    "slower": slower,
                    "goal": AUTO_GOAL,
                    "verdict": "reached" if slower <= AUTO_GOAL else "missed",
                }
            )
            cell.write_text(json.dumps(rows[-1]))
            for engine in engines.values():
                engine.close()
            gc.collect()
    return rows


_EXPORT = """
import json, sys, time
from pathlib import Path
import fastrec
from fastrec.models import Ranker, RankerConfig
from fastrec.measure.memory import memory_mb
from fastrec.exporters.model_spec import spec_of

folder = Path(sys.argv[1])
small = Ranker(RankerConfig(n_items=2000, n_categories=50)).eval()
fastrec.export(small, folder / "small.onnx", spec_of(small, ()).sample({"B": 2}))
model = Ranker(RankerConfig.taobao()).eval()
before = memory_mb()["VmRSS"]
Path("/proc/self/clear_refs").write_text("5")
start = time.perf_counter()
fastrec.export(model, folder / "model.onnx", spec_of(model, ()).sample({"B": 2}))
seconds = time.perf_counter() - start
size = sum(t.numel() * t.element_size() for t in model.parameters()) / 1e6
print(json.dumps({"seconds": seconds, "extra_mb": memory_mb()["VmHWM"] - before, "model_mb": size}))
"""


def time_export() -> dict[str, Any]:
    """The canonical ranker's export, checks included."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, folder], capture_output=True, text=True, check=True
        )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["extra"] = row["extra_mb"] / row["model_mb"]
    row["verdict"] = {
        f"{EXPORT_GOAL_S:g} s": "reached" if row["seconds"] < EXPORT_GOAL_S else "missed",
        f"{EXPORT_GOAL_X:g}x": "reached" if row["extra"] < EXPORT_GOAL_X else "missed",
    }
    return row


def main(
    kept: Annotated[Path, typer.Option(help="Folder of built engines; those there are used.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
    build_only: Annotated[bool, typer.Option(help="Build the engines and stop.")] = False,
    parts: Annotated[str, typer.Option(help="Comma-separated.")] = "own,custom,auto,export",
    threads: Annotated[int, typer.Option(help="Threads a call may use.")] = 2,
    seconds: Annotated[float, typer.Option(help="Of measuring, a comparison.")] = 20.0,
) -> None:
    """Measure; parts that are left out keep the figures of the report that is there."""
    wanted = set(parts.split(","))
    if unknown := wanted - {"own", "custom", "auto", "export"}:
        raise typer.BadParameter(f"own, custom, auto and export, not {', '.join(sorted(unknown))}")
    kept.mkdir(parents=True, exist_ok=True)
    if "own" in wanted:
        build_own(kept, threads)
    if "custom" in wanted:
        build_custom(kept, threads)
    if build_only:
        return
    if out is None:
        raise typer.BadParameter("--out is needed for a report")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "engines.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    report |= {"machine": machine_card(), "threads": threads}
    start = time.perf_counter()
    if "own" in wanted:
        report["own"] = time_own(kept, seconds)
    if "custom" in wanted:
        report["custom"] = time_custom(kept, seconds)
    if "auto" in wanted:
        report["auto"] = time_auto(kept, threads, seconds)
    if "export" in wanted:
        report["export"] = time_export()
    Console(stderr=True).print(f"{time.perf_counter() - start:.0f} s")
    file.write_text(json.dumps(report, indent=1) + "\n")
    (out / "engines.md").write_text(text := markdown(report))
    Console().print(text, markup=False)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        "# Our export on other engines, and the choice of one",
        "",
        f"{machine['cpu']}, {', '.join(machine['isa'])}; {report['threads']} threads; "
        + ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
        + f"; {machine['date']}. Made by `bench/bench_engines.py`; random weights.",
    ]
    if rows := report.get("own"):
        lines += [
            "",
            "Our INT8 export against the same network quantised by the engine's own tools (ONNX",
            "Runtime's dynamic quantiser, nncf), canonical ranker, 100 events, 50 candidates:",
            "",
            "| engine | B | ours ms | its own ms | times as fast | goal |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            low, high = row["ci95"]
            lines.append(
                f"| {row['engine']} | {row['batch']} | {row['ours_ms']:.2f} | "
                f"{row['own_ms']:.2f} | {row['speed']:.2f} [{low:.2f}, {high:.2f}] | "
                f">= {row['goal']:g}: {row['verdict']} |"
            )
    if rows := report.get("custom"):
        lines += [
            "",
            "fastrec's kernels in ONNX Runtime (`custom_ops`), on the canonical ranker with 40 %",
            "pruned and INT8; native, the whole ranker as one plan, beside them:",
            "",
            f"| B | {' | '.join(f'{name} ms' for name in CUSTOM)} | custom ops: times as fast |",
            "|---" * (2 + len(CUSTOM)) + "|",
        ]
        for row in rows:
            low, high = row["ci95"]
            times = " | ".join(f"{row['ms'][name]:.2f}" for name in CUSTOM)
            speed = f"{row['speed']:.2f} [{low:.2f}, {high:.2f}]"
            lines.append(f"| {row['batch']} | {times} | {speed} |")
    if rows := report.get("auto"):
        names = sorted({name for row in rows for name in row["ms"]})
        lines += [
            "",
            '`backend="auto"` against the best engine (milliseconds, lower quartile of rounds; the',
            "canonical ranker with a table of 20,000 items, torch.compile left out):",
            "",
            f"| precision | B | L | m | {' | '.join(names)} | chosen | slower by | goal |",
            "|---" * (7 + len(names)) + "|",
        ]
        for row in rows:
            times = " | ".join(f"{row['ms'][n]:.2f}" if n in row["ms"] else "" for n in names)
            lines.append(
                f"| {row['precision']} | {row['batch']} | {row['length']} | {row['candidates']} | "
                f"{times} | {row['chosen']} | {row['slower'] - 1:.1%} | "
                f"<= {row['goal'] - 1:.0%}: {row['verdict']} |"
            )
    if row := report.get("export"):
        verdicts = ", ".join(f"{goal}: {verdict}" for goal, verdict in row["verdict"].items())
        lines += [
            "",
            f"Export of the canonical ranker ({row['model_mb']:.0f} MB), checks included: "
            f"{row['seconds']:.0f} s, {row['extra_mb']:.0f} MB of extra memory "
            f"({row['extra']:.1f} times the model). {verdicts}.",
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)

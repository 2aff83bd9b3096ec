"""``make gpu-report``: our Triton kernels on a GPU, and the ranker in torch, which they must beat.

Runs the tests of the Triton kernels, then times, by CUDA events over repeated calls, the bench's
samples of the ops that have one beside their reference in torch, and the canonical ranker in torch
eager and torch.compile with CUDA graphs. Without a GPU: the tests, interpreted, and a report that
says so.
Writes gpu_report.json and gpu_report.md. It has never been run on a GPU by its authors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastrec import kernels
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.machine import machine_card

WARMUP, CALLS = 20, 200


def device_ms(call: Callable[[], Any]) -> dict[str, float]:
    """p50 and p99 of single calls, between CUDA events."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    p50, p99 = torch.tensor(times).quantile(torch.tensor([0.5, 0.99])).tolist()
    return {"p50": p50, "p99": p99}


def random_request(config: RankerConfig, batch: int) -> tuple[torch.Tensor, ...]:
    """A full-length request of the canonical ranker on the GPU."""
    length, candidates = config.history_length, 50

    def ids(rows: int, width: int) -> torch.Tensor:
        return torch.randint(1, rows, (batch, width), device="cuda")

    return (
        ids(config.n_items, length),
        ids(config.n_categories, length),
        ids(config.n_behaviours + 1, length),
        torch.full((batch,), length, device="cuda"),
        ids(config.n_items, candidates),
        ids(config.n_categories, candidates),
    )


def run_tests() -> dict[str, Any]:
    """The Triton kernels' tests: on the GPU, or interpreted where there is none."""
    folder = Path(__file__).parents[1] / "tests" / "kernels" / "gpu"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", folder], capture_output=True, text=True
    )
    return {"status": run.returncode, "summary": (run.stdout.splitlines() or ["none ran"])[-1]}


def op_rows() -> list[dict[str, Any]]:
    """Every op that has a Triton kernel, on its bench samples, beside its torch reference."""
    rows = []
    for op_id, spec in kernels.registry().items():
        if "triton" not in spec.backends.can_run:
            continue
        for sample in spec.samples():
            if not sample.bench:
                continue
            args, kwargs = sample.make()
            args = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)
            kwargs = {n: a.cuda() if isinstance(a, torch.Tensor) else a for n, a in kwargs.items()}
            spec.compare(spec.function(*args, **kwargs, backend="triton"), args, kwargs)
            for engine, call in (
                ("triton", lambda a=args, k=kwargs, f=spec.function: f(*a, **k, backend="triton")),
                ("torch reference", lambda a=args, k=kwargs, f=spec.reference: f(*a, **k)),
            ):
                precision = str(args[0].dtype).removeprefix("torch.")
                case = {"engine": f"{op_id} {sample.name}, {engine}", "precision": precision}
                rows.append(
                    case
                    | {
                        "batch": sample.labels.get("rows", sample.labels.get("batch")),
                        "device_ms": device_ms(call),
                    }
                )
    return rows


def main(out: Annotated[Path, typer.Option(help="Folder for the report.")]) -> None:
    """Test and time the Triton kernels, and torch on the canonical ranker."""
    tests = run_tests()
    Console(stderr=True).print(f"Triton tests: {tests['summary']}")
    if not torch.cuda.is_available():
        why = "torch sees no CUDA device: a dry run, no figure was measured"
        report = {"machine": machine_card(), "tests": tests, "rows": None, "why": why}
        (out / "gpu_report.json").write_text(json.dumps(report, indent=2) + "\n")
        text = f"# No GPU\n\n{why}.\n\nTests of the Triton kernels: {tests['summary']}\n"
        (out / "gpu_report.md").write_text(text)
        sys.exit(tests["status"])
    torch.manual_seed(0)
    rows = op_rows()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = Ranker(RankerConfig.taobao()).eval().to("cuda", dtype)
        compiled = torch.compile(model, mode="reduce-overhead")
        for batch in (1, 8, 64):
            request = random_request(model.config, batch)
            for engine, run in (("torch", model), ("torch_compile", compiled)):
                with torch.inference_mode():
                    times = device_ms(lambda run=run, request=request: run(*request))
                rows.append(
                    {"engine": engine, "precision": precision, "batch": batch, "device_ms": times}
                )
    gpu = torch.cuda.get_device_name()
    report = {"machine": machine_card() | {"gpu": gpu}, "tests": tests, "rows": rows}
    (out / "gpu_report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        f"# {gpu}",
        "",
        f"Tests of the Triton kernels: {tests['summary']}",
        "",
        "| engine | precision | batch | p50 ms | p99 ms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['engine']} | {r['precision']} | {r['batch']} | {r['device_ms']['p50']:.3f} | "
        f"{r['device_ms']['p99']:.3f} |"
        for r in rows
    ]
    (out / "gpu_report.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)

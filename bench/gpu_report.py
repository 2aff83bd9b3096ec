"""``make gpu-report``: the canonical ranker in torch on a GPU, the figures our kernels must beat.

fastrec has no GPU kernel yet, so this measures rivals only: torch eager and torch.compile with CUDA
graphs, fp32 and bf16, by CUDA events over repeated calls. Writes gpu_report.json and gpu_report.md.
It has never been run on a GPU by its authors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

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


def main(out: Annotated[Path, typer.Option(help="Folder for the report.")]) -> None:
    """Measure torch on the canonical ranker."""
    if not torch.cuda.is_available():
        Console(stderr=True).print("gpu-report needs a CUDA GPU, and torch sees none here")
        sys.exit(1)
    torch.manual_seed(0)
    rows = []
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
    report = {"machine": machine_card() | {"gpu": gpu}, "rows": rows}
    (out / "gpu_report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        f"# {gpu}",
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

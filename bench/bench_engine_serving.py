"""A process that serves an engine's file: its memory, and whether calls leak.

``python bench/bench_engine_serving.py --out DIR``. Each model is quantised here, saved with
``engine.save`` and opened by ``python -m fastrec.runtime.child``, a process without torch, which
answers ``calls`` requests of one user and 50 candidates. What is resident is read after each tenth
of the calls, and held against a process that has imported numpy and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fastrec
from bench_ranker import request, variant
from fastrec.measure.machine import machine_card
from fastrec.measure.memory import run_child
from fastrec.models import Ranker, RankerConfig

SMALL = RankerConfig(
    n_items=2000, n_categories=50, history_length=20, d=32, category_dim=8, ffn=64, tower=(64, 32)
)
# A leak of one small object a call would be 16 MB or more in 10^6 calls; the allocator's own
# settling stays below this.
GROWTH_GOAL_MB = 1.0
RSS_GOAL_MB = 150.0
BARE = """
import json
import numpy
status = open("/proc/self/status").read()
kb = next(int(l.split()[1]) for l in status.splitlines() if l.startswith("VmHWM"))
print(json.dumps({"rss_mb": kb * 1024 / 1e6}))
"""


def saved(config: RankerConfig, sparsity: float, folder: Path, threads: int) -> Path:
    """The file of an int8 engine with random weights."""
    torch.manual_seed(0)
    model = variant(Ranker(config).eval(), sparsity)
    settings = {"executor": "plan"}
    examples = request(config, 1, seed=2)
    with fastrec.compile(model, examples, "native", threads, settings=settings) as engine:
        return engine.save(folder / "ranker.fastrec")


def serve(path: Path, calls: int, threads: int) -> dict[str, Any]:
    """The child's report."""
    command = [sys.executable, "-m", "fastrec.runtime.child", "--artifact", str(path)]
    command += ["--requests", str(calls), "--threads", str(threads), "--candidates", "50"]
    return run_child(command, timeout_s=24 * 3600)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    threads: Annotated[int, typer.Option(help="Threads a call may use.")] = 2,
    calls: Annotated[int, typer.Option(help="Of the small model.")] = 1_000_000,
    canonical_calls: Annotated[int, typer.Option(help="Of the canonical one.")] = 100_000,
) -> None:
    """Serve a small and the canonical int8 ranker, and tell what the processes held."""
    console = Console(stderr=True)
    bare = float(run_child([sys.executable, "-c", BARE])["rss_mb"])
    rows = []
    for name, config, sparsity, count in (
        ("small, int8", SMALL, 0.0, calls),
        ("canonical, int8", RankerConfig.taobao(), 0.0, canonical_calls),
        ("canonical, 40 % pruned, int8", RankerConfig.taobao(), 0.4, canonical_calls),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = saved(config, sparsity, Path(folder), threads)
            console.print(f"{name}: {path.stat().st_size / 1e6:.1f} MB, {count:,} calls")
            report = serve(path, count, threads)
            rows.append(_row(name, path.stat().st_size / 1e6, bare, report))
    whole = {"machine": machine_card(), "threads": threads, "bare_rss_mb": bare, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine_serving.json").write_text(json.dumps(whole, indent=1) + "\n")
    text = markdown(whole)
    (out / "engine_serving.md").write_text(text)
    Console().print(text, markup=False)


def _row(name: str, file_mb: float, bare: float, report: dict[str, Any]) -> dict[str, Any]:
    looks = report["rss_mb"]
    # The first tenth of the calls is where arenas and caches settle.
    growth = looks[-1][1] - looks[1][1] if len(looks) > 1 else None
    return {
        "model": name,
        "file_mb": file_mb,
        "over_bare_mb": report["serving_rss_mb"] - bare,
        "growth_mb": growth,
        **report,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        "# A process that serves an engine's file",
        "",
        f"{machine['cpu']}, {report['threads']} threads; commit {machine.get('commit')}. Resident "
        f"memory in MB (10^6 bytes), mapped pages of the file included; Python with numpy alone: "
        f"{report['bare_rss_mb']:.0f} MB. Growth: from the first tenth of the calls to the last.",
        "",
        "| model | file | load ms | serving, over bare | goal | torch imported | calls | growth | "
        "goal | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        over, growth = row["over_bare_mb"], row["growth_mb"]
        lines.append(
            f"| {row['model']} | {row['file_mb']:.1f} | {row['load_ms']:.0f} | {over:.0f} | "
            f"<= {RSS_GOAL_MB:g}: {_verdict(over <= RSS_GOAL_MB)} | {row['torch_imported']} | "
            f"{row['requests']:,} | {growth:.2f} | <= {GROWTH_GOAL_MB:g}: "
            f"{_verdict(growth <= GROWTH_GOAL_MB)} | {row['p50_ms']:.3f} | {row['p99_ms']:.3f} |"
        )
    lines += ["", "Resident after so many calls:", ""]
    for row in report["rows"]:
        looks = ", ".join(f"{calls:,}: {mb:.2f}" for calls, mb in row["rss_mb"])
        lines.append(f"- {row['model']}: {looks}")
    return "\n".join([*lines, ""])


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


if __name__ == "__main__":
    typer.run(main)

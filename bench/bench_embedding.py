"""The canonical INT8 ranker in a C program: its memory, and its latency over Python's.

``python bench/bench_embedding.py --out DIR``: embedding.json and embedding.md. One request of 50
candidates on one thread. Latency: pairs of processes, C then Python, each timing the same calls;
the ratio of a pair is that of their median calls.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from fastrec.info import c_flags
from fastrec.measure.machine import machine_card
from fastrec.runtime import load_engine

HERE = Path(__file__).parent
GOAL_MB, GOAL_RATIO = 15, 1.02
WARM, CALLS = 20, 60


def python_calls(path: Path) -> dict[str, Any]:
    """What embedding.c does, in Python; imports no torch."""
    engine = load_engine(path, threads=1)
    values = [
        np.arange(100) * 7919 + i + 1 if isinstance(field.rows, int) else np.array([100])
        for i, field in enumerate(engine.spec.fields)
    ]
    inputs = []
    for i, (field, ids) in enumerate(zip(engine.spec.fields, values, strict=True)):
        if not isinstance(field.rows, int):
            inputs.append(ids)
        else:
            inputs.append((ids[: 100 if i < 3 else 50] % field.rows)[None])
    us = []
    for _ in range(WARM + CALLS):
        start = time.perf_counter_ns()
        scores = engine(*inputs)
        us.append((time.perf_counter_ns() - start) / 1e3)
    return {"us": us[WARM:], "first_score": float(scores[0, 0])}


def build(path: Path) -> None:
    """The canonical ranker with random weights, in INT8."""
    import torch

    import fastrec
    from fastrec.exporters.model_spec import spec_of
    from fastrec.models import Ranker, RankerConfig

    torch.manual_seed(0)
    model = Ranker(RankerConfig.taobao()).eval()
    request = spec_of(model, ()).sample({"B": 4, "L": 100, "m": 50}, seed=0)
    inputs = tuple(map(torch.from_numpy, request))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    fastrec.compile(model, inputs, "native", threads=1, fallback="error").save(path)


def child(*command: str | Path) -> dict[str, Any]:
    made = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def measure(engine: Path, program: Path, rounds: int) -> dict[str, Any]:
    pairs = []
    for _ in range(rounds):
        c = child(program, engine, str(WARM), str(CALLS), "0")
        python = child(sys.executable, __file__, "--engine", engine)
        if np.float32(c["first_score"]) != np.float32(python["first_score"]):
            raise SystemExit("C and Python give other scores")
        pairs.append((c, python))
    ratios = sorted(median(c["us"]) / median(p["us"]) for c, p in pairs)
    copied = child(program, engine, "0", "5", "1")
    size = engine.stat().st_size
    return {
        "engine_bytes": size,
        "mapped_over_mb": (pairs[0][0]["rss_kb"] * 1024 - size) / 1e6,
        "copied_over_mb": (copied["rss_kb"] * 1024 - size) / 1e6,
        "c_us": median(median(c["us"]) for c, _ in pairs),
        "python_us": median(median(p["us"]) for _, p in pairs),
        "ratio": median(ratios),
        "ratios": ratios,
        "best_ratio": min(min(c["us"]) for c, _ in pairs) / min(min(p["us"]) for _, p in pairs),
    }


def table(found: dict[str, Any], machine: dict[str, Any]) -> str:
    memory = max(found["mapped_over_mb"], found["copied_over_mb"])
    return f"""# The engine in a C program

{machine["cpu"]}; commit {machine["commit"]}. The canonical ranker in INT8, random weights: an engine
file of {found["engine_bytes"] / 1e6:.1f} MB. One request of 100 events and 50 candidates, one thread.
`bench/bench_embedding.py --rounds {len(found["ratios"])}`.

| what | measured | goal |
|---|---|---|
| resident memory over the file's bytes, mapped | {found["mapped_over_mb"]:.1f} MB | <= {GOAL_MB} MB |
| resident memory over the file's bytes, private copy | {found["copied_over_mb"]:.1f} MB | <= {GOAL_MB} MB: {"reached" if memory <= GOAL_MB else "missed"} |
| median call in C / in Python | {found["c_us"]:.0f} us / {found["python_us"]:.0f} us | |
| C over Python, median of {len(found["ratios"])} pairs of processes | {found["ratio"]:.3f} ({found["ratios"][0]:.3f} to {found["ratios"][-1]:.3f}) | <= {GOAL_RATIO}: {"reached" if found["ratio"] <= GOAL_RATIO else "missed"} |
| C over Python, the fastest call of each | {found["best_ratio"]:.3f} | |
"""  # noqa: E501


def main(
    out: Annotated[Path | None, typer.Option()] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    engine: Annotated[Path | None, typer.Option(help="Time this engine's calls, no more.")] = None,
) -> None:
    if engine is not None:
        print(json.dumps(python_calls(engine)))
        return
    if out is None:
        raise typer.BadParameter("a folder", param_hint="--out")
    with tempfile.TemporaryDirectory() as folder:
        program, path = Path(folder) / "embedding", Path(folder) / "ranker.engine"
        flags = shlex.split(c_flags())
        subprocess.run(
            ["cc", "-O2", "-std=gnu11", HERE / "embedding.c", *flags, "-o", program], check=True
        )
        build(path)
        found = measure(path, program, rounds)
    machine = machine_card()
    out.mkdir(parents=True, exist_ok=True)
    (out / "embedding.json").write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
    (out / "embedding.md").write_text(table(found, machine))


if __name__ == "__main__":
    typer.run(main)

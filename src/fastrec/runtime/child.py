"""``python -m fastrec.runtime.child``: one engine in a process of its own, its memory as JSON.

Loads an engine artifact (no torch), or a ``fastrec.save`` checkpoint compiled for a backend, serves
N requests and prints one JSON object: the high-water mark of resident memory over the whole life
(``peak_rss_mb``) and while serving (``serving_rss_mb``), in MB (10^6 bytes); how much is resident
as the calls go on (``rss_mb``); and the calls' percentiles.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, FastrecError
from fastrec.measure.latency import LatencyHistogram
from fastrec.measure.memory import memory_mb
from fastrec.runtime.engine import Engine

# Resident memory is read after each of this many equal shares of the calls.
_LOOKS = 10


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit status is 1 after a typed error, which is printed as JSON too."""
    parser = argparse.ArgumentParser(prog="python -m fastrec.runtime.child", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--artifact", type=Path, help="what engine.save() wrote")
    source.add_argument("--model", type=Path, help="what fastrec.save() wrote")
    parser.add_argument("--backend", default="native", help="with --model")
    parser.add_argument("--precision", default=None, help="with --model")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=50)
    args = parser.parse_args(argv)
    try:
        report = serve(args)
    except FastrecError as error:
        _out({"error": f"{type(error).__name__}: {error}"})
        return 1
    _out(report)
    return 0


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """Load, serve and measure; see the module's notes."""
    sizes = {"B": args.batch, "m": args.candidates}
    start = time.perf_counter_ns()
    engine = _open(args, sizes)
    load_ms = (time.perf_counter_ns() - start) / 1e6
    requests = [engine.spec.sample(sizes, seed=seed) for seed in range(8)]
    engine(*requests[0])
    gc.collect()
    loaded = memory_mb()["VmRSS"]
    # Writing 5 sets the high-water mark back to the present size (proc(5)).
    try:
        peak_before = memory_mb()["VmHWM"]
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        peak_before = memory_mb()["VmHWM"]
    times = LatencyHistogram()
    resident = {0: loaded}
    for look in range(1, _LOOKS + 1):
        end = args.requests * look // _LOOKS
        for i in range(times.count, end):
            start = time.perf_counter_ns()
            engine(*requests[i % len(requests)])
            times.add(time.perf_counter_ns() - start)
        resident[end] = memory_mb()["VmRSS"]
    serving = memory_mb()["VmHWM"]
    return {
        "backend": engine.backend,
        "precision": engine.precision,
        "threads": engine.threads,
        "batch": args.batch,
        "requests": args.requests,
        "load_ms": load_ms,
        "peak_rss_mb": max(peak_before, serving),
        "serving_rss_mb": serving,
        "loaded_rss_mb": loaded,
        "rss_mb": list(resident.items()),
        **{f"p{q}_ms": times.percentile_ms(q) if times.count else None for q in (50, 95, 99, 99.9)},
        "worst_ms": times.worst_ns / 1e6,
        "torch_imported": "torch" in sys.modules,
    }


def _open(args: argparse.Namespace, sizes: dict[str, int]) -> Engine:
    if args.artifact is not None:
        from fastrec.runtime.artifact import load_engine

        return load_engine(args.artifact, threads=args.threads)
    from fastrec.compress import load
    from fastrec.exporters.model_spec import spec_of
    from fastrec.runtime.compiler import compile

    model = load(args.model)
    if getattr(model, "config", None) is None:
        raise ArgumentError("--model", "a checkpoint of a fastrec model", type(model).__name__)
    examples: tuple[np.ndarray, ...] = spec_of(model, ()).sample(sizes)
    return compile(model, examples, args.backend, args.threads, precision=args.precision)


def _out(report: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    sys.exit(main())

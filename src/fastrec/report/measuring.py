"""Timing the engines of one variant: all of them in turn, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrec.measure.timing import Samples, interleaved, ratio
from fastrec.report.engines import Built, Request, attempt
from fastrec.report.layout import ENGINE_TITLES
from fastrec.report.schema import PERCENTILES

# Calls of a turn: enough at B=1 to leave the settling call behind, few where a call is long.
_CALLS = {1: 8, 8: 3}
_MAX_ROUNDS = 400


def time_engines(
    engines: Mapping[str, Built],
    requests: Sequence[Request],
    *,
    batch: int,
    seconds_per_engine: float,
    seed: int = 0,
    clock: Callable[[], int] | None = None,
) -> dict[str, Samples]:
    """Interleaved rounds over the engines that passed their gate; name -> samples."""
    usable = {name: built.engine for name, built in engines.items() if built.usable}
    timed = {name: engine for name, engine in usable.items() if engine is not None}
    if not timed:
        return {}
    return interleaved(
        timed,
        requests,
        rounds=_MAX_ROUNDS,
        calls=_CALLS.get(batch, 2),
        warmup=2,
        seconds_budget=seconds_per_engine * len(timed),
        seed=seed,
        clock=clock or time.perf_counter_ns,
    )


def busy_seconds() -> tuple[float, float] | None:
    """(CPU seconds of the whole machine, those of this process) so far; None where unreadable."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, *_ = (int(f) for f in fields)
    mine = os.times()
    machine = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return machine, mine.user + mine.system


def cores_of_others(
    before: tuple[float, float] | None, after: tuple[float, float] | None, seconds: float
) -> float | None:
    """Cores that other processes kept busy between two :func:`busy_seconds`."""
    if before is None or after is None or seconds <= 0:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return round(max(0.0, others / seconds), 2)


def latency_of(samples: Samples) -> dict[str, float]:
    """p50, p95, p99 in milliseconds."""
    values = samples.to_dict()
    return {name: float(values[name]) for name in PERCENTILES}


def best_throughput(
    built: Built, requests: Mapping[int, Sequence[Request]], batches: Sequence[int], seconds: float
) -> tuple[dict[str, Any] | None, str | None]:
    """The best users per second over ``batches``: ({"rps", "batch", "all"}, None) or (None, why).

    Each engine's own mode for throughput: OpenVINO's THROUGHPUT hint with a stream a thread, ONNX
    Runtime's better of all threads a call or one call a thread, a closed loop for the others.
    """
    engine = built.engine
    assert engine is not None
    found: dict[int, float] = {}
    for batch in batches:

        def run(batch: int = batch) -> float:
            return batch * engine.throughput(requests[batch], seconds=seconds)

        rate, why = attempt(f"throughput at batch {batch} failed", run)
        if why is not None:
            return None, why
        found[batch] = rate
    best = max(found, key=lambda batch: found[batch])
    every = {str(batch): rate for batch, rate in found.items()}
    return {"rps": found[best], "batch": best, "all": every}, None


def native_ratio(
    variant: str, batch: int, samples: Mapping[str, Samples], engines: Mapping[str, Built]
) -> dict[str, Any]:
    """Median of native over the best rival's with its 95 % interval, below 1 = native is faster."""
    line: dict[str, Any] = {"variant": variant, "batch": batch, "ratio": None, "why": None}
    native = next((n for n, b in engines.items() if b.spec.engine == "native"), None)
    rivals = {n: s for n, s in samples.items() if n != native}
    if native is None or native not in samples:
        return line | {"why": "the native engine was not timed"}
    if not rivals:
        return line | {"why": "no rival was timed"}
    best = min(rivals, key=lambda name: rivals[name].p50_ms)
    found = ratio(samples[native], rivals[best])
    spec = engines[best].spec
    return line | {
        "rival": f"{ENGINE_TITLES[spec.engine]} {spec.precision}",
        "native_ms": samples[native].p50_ms,
        "rival_ms": rivals[best].p50_ms,
        "ratio": found.value,
        "ci95": [found.low, found.high],
    }

"""One case: gate, interleaved rounds, and a row an engine."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import rivals
from fastrec import kernels
from fastrec.kernels._registry import OpSpec, Sample
from fastrec.measure.ceilings import Ceilings
from fastrec.measure.timing import Samples, interleaved, measured_spin_s, ratio
from gate import why_wrong

Call = Callable[[], Any]
OURS = "fastrec"
# Ours alone, without the layer around it: what shares of a ceiling are of.
KERNEL = "fastrec kernel"
# A call this long is not warmed up again in each turn: waking threads takes less than 1 % of it.
SLOW_S = 0.03


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds, least_rounds: as many interleaved rounds as ``case_s`` seconds allow, within these.
        turn_s, most_calls: an engine's counted calls a round last about so long.
        warm_s: uncounted calls before them.
    """

    rounds: int = 25
    least_rounds: int = 5
    case_s: float = 1.0
    turn_s: float = 0.01
    most_calls: int = 50
    warm_s: float = 0.002


QUICK = Settings(rounds=3, least_rounds=2, case_s=0.2, turn_s=0.002, most_calls=5, warm_s=0.0005)


@dataclass(frozen=True)
class Case:
    """One op on one bench sample with so many threads; ``mode`` is forward or training."""

    spec: OpSpec
    sample: Sample
    threads: int
    mode: str

    @property
    def key(self) -> str:
        return f"{self.spec.op_id} {self.sample.name} {self.threads} {self.mode}"


def cases(op_ids: Sequence[str] | None, threads: Sequence[int], quick: bool) -> Iterator[Case]:
    """Registry-driven: every op x bench sample x thread count x mode; quick: an op's smallest."""
    for count in threads:
        for op_id, spec in kernels.registry().items():
            if op_ids and op_id not in op_ids:
                continue
            chosen = [sample for sample in spec.samples() if sample.bench]
            if quick:
                chosen = [min(chosen, key=lambda sample: sample.macs)] if chosen else []
            for sample in chosen:
                for mode in rivals.modes(op_id, sample):
                    yield Case(spec, sample, count, mode)


def measure(case: Case, ceilings: Ceilings, settings: Settings) -> list[dict[str, Any]]:
    """The case's rows, ours first; engines that are wrong or fail have a row that says why."""
    kernels.set_num_threads(case.threads)
    torch.set_num_threads(case.threads)
    args, kwargs = case.sample.make()
    with warnings.catch_warnings(), torch.set_grad_enabled(case.mode == "training"):
        # torch, Inductor and the engines warn of their own deprecations.
        warnings.simplefilter("ignore")
        calls, rows = _gated(case, args, kwargs)
        if OURS not in calls:
            return rows
        precision = _precision(case.spec.op_id, args)
        peaks = [ceilings.peak(precision)]
        taken = _interleaved(calls, case.threads, settings)
    peaks.append(ceilings.peak(precision))
    limit = {
        "precision": precision,
        "peak_gops": max(peaks),
        "bandwidth_gbs": ceilings.bandwidth(case.sample.bytes_moved),
    }
    for name, samples in taken.items():
        row = next(row for row in rows if row["engine"] == name)
        row |= _figures(case, samples, taken[OURS])
        if name in (OURS, KERNEL):
            row |= _roofline(case, samples, limit)
    return rows


def _gated(case: Case, args: Any, kwargs: Any) -> tuple[dict[str, Call], list[dict[str, Any]]]:
    """The engines that are right, and a row for each that was tried."""
    spec, module = case.spec, rivals.load(case.spec.op_id)
    rows: list[dict[str, Any]] = []

    def row(engine: str, error: float | None = None, why: str | None = None) -> dict[str, Any]:
        new = {
            "op": spec.op_id,
            "case": case.sample.name,
            "labels": case.sample.labels,
            "threads": case.threads,
            "mode": case.mode,
            "engine": engine,
            "error": error,
            "why_not_timed": why,
        }
        rows.append(new)
        return new

    # What other cases compiled would count towards the limit of compilations.
    torch._dynamo.reset()
    value = getattr(module, "value", lambda output, args, kwargs: output)
    precision = _precision(spec.op_id, args)
    try:
        if case.mode == "training":
            tried = module.training(args, kwargs, case.threads)
            ours = tried.pop(OURS)
            # torch's own autograd is what ours has to agree with; the tests hold it against fp64.
            # Where none is affordable (a map of L x L), ours is timed alone.
            expected = next(iter(tried.values()), ours)()
            error, why = why_wrong(ours, expected, _same, OURS, precision)
        else:
            spec.compare(spec.function(*args, **kwargs), args, kwargs)
            prepare = getattr(module, "prepared", None)
            ours = prepare(args, kwargs) if prepare else lambda: spec.function(*args, **kwargs)
            output = ours()
            spec.compare(output, args, kwargs)
            expected, error, why = value(output, args, kwargs), None, None
            tried = module.rivals(args, kwargs, case.threads)
            if hasattr(module, "kernel"):
                tried = {KERNEL: module.kernel(args, kwargs), **tried}
    except Exception as failure:  # this op's figures are lost, the others' are not
        said = (str(failure).splitlines() or ["without a message"])[0]
        row(OURS, why=f"{type(failure).__name__}: {said[:200]}")
        return {}, rows
    row(OURS, error, why)
    right = {} if why else {OURS: ours}
    for name, call in tried.items():
        if call is None:
            continue
        read = _same if case.mode == "training" else lambda output: value(output, args, kwargs)
        error, why = why_wrong(call, expected, read, name, precision)
        row(name, error, why)["other_work"] = getattr(call, "other_work", None)
        if why is None:
            right[name] = call
    return right, rows


def _same(output: Any) -> Any:
    return output


def _interleaved(calls: dict[str, Call], threads: int, settings: Settings) -> dict[str, Samples]:
    """Every engine in its warm state: the previous one's threads have stopped spinning, its own
    are awake and its data is in the caches. The same for all, see docs/results/README.md."""
    engines, counts, warm, round_s = {}, {}, {}, 0.0
    for name, call in calls.items():
        # The gate has warmed it up.
        cost = _seconds(call)
        slow = cost > SLOW_S
        if not slow:
            cost = min(cost, _seconds(call), _seconds(call))
        counts[name] = max(1, min(settings.most_calls, int(settings.turn_s / cost)))
        warm[name] = None if slow else settings.warm_s
        spin = 0.0 if threads == 1 else measured_spin_s(call, looks=1 if slow else 3)
        engines[name] = _Engine(call, spin)
        round_s += (0.0 if slow else max(cost, settings.warm_s)) + counts[name] * cost + spin
    rounds = max(settings.least_rounds, min(settings.rounds, int(settings.case_s / round_s)))
    return interleaved(engines, [()], rounds=rounds, calls=counts, warmup=1, warm_s=settings.warm_s)


class _Engine:
    """A call with the time its threads spin afterwards, as ``interleaved`` reads it."""

    def __init__(self, call: Call, spin_s: float) -> None:
        self.call, self.spin_s = call, spin_s

    def __call__(self) -> Any:
        return self.call()


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _precision(op_id: str, args: Any) -> str:
    """Which peak the op's multiply-adds are held against."""
    if op_id in ("sparse_int8_linear", "window_sparse_attention_int8"):
        return "int8"
    dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
    return "bf16" if dtypes & {torch.bfloat16, torch.float16} else "fp32"


def _figures(case: Case, samples: Samples, ours: Samples) -> dict[str, Any]:
    speedup = ratio(samples, ours)
    figures = {
        "us": {q: getattr(samples, f"{q}_ms") * 1e3 for q in ("p50", "p95", "p99")},
        "round_us": [float(x) / 1e3 for x in np.median(samples.ns, axis=1)],
        "best_round_us": samples.best_round_ms * 1e3,
        "calls_a_round": int(samples.ns.shape[1]),
        "fastrec_is_faster_by": {"x": speedup.value, "ci95": [speedup.low, speedup.high]},
    }
    if case.mode == "forward":
        figures["gops"] = 2 * case.sample.macs / samples.p50_ms / 1e6
    return figures


def _roofline(case: Case, samples: Samples, limit: dict[str, Any]) -> dict[str, Any]:
    """Shares of what the machine could do; only the forward's operations are declared."""
    if case.mode != "forward":
        return {}
    operations, moved = 2 * case.sample.macs, case.sample.bytes_moved
    seconds = samples.p50_ms / 1e3
    compute_us = operations / limit["peak_gops"] / 1e3 if limit["peak_gops"] else 0.0
    memory_us = moved / limit["bandwidth_gbs"] / 1e3
    return limit | {
        "operations": operations,
        "bytes": moved,
        "intensity": operations / max(moved, 1),
        "gbs": moved / seconds / 1e9,
        "peak_share": compute_us / (samples.p50_ms * 1e3) if compute_us else None,
        "bandwidth_share": memory_us / (samples.p50_ms * 1e3),
        "limit_us": max(compute_us, memory_us),
        "limited_by": "compute" if compute_us >= memory_us else "bandwidth",
    }

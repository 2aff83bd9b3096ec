"""The canonical ranker as one native call against every other runtime: ranker.json, ranker.md.

``python bench/bench_ranker.py --out DIR``. Weights are random, since a dense layer's time does not
depend on their values; pruned variants keep the groups of largest norm of those weights, so their
sparsity is real. Each engine is held against its own torch model before it is timed; rounds are
interleaved in one process, and ratios carry 95 % intervals. Quality is ``fastrec table1``'s matter.

Saturated: requests of one user, as many at once as there are cores, each engine in its own mode
for that: ours a client a core, each request on one thread; OpenVINO the THROUGHPUT hint, a stream a
core and an async queue that is kept full; ONNX Runtime the better of a client a core and one call
at a time. Engines take turns here too.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console

import fastrec
from fastrec.errors import FastrecError
from fastrec.measure.ceilings import Ceilings
from fastrec.measure.machine import machine_card
from fastrec.measure.timing import SETTLE_S, Samples, interleaved, ratio
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.engine import Engine


class Variant(NamedTuple):
    """What is done to our network, and the precision of its rivals, which run the dense one.

    ``sparsity`` None: it stays in fp32. ``attention``: its scores and sums are integers too.
    """

    sparsity: float | None
    precision: str
    attention: bool = False


VARIANTS = {
    "fp32": Variant(None, "fp32"),
    "dense int8": Variant(0.0, "int8"),
    "40 % pruned, int8": Variant(0.4, "int8"),
    "40 % pruned, int8, int8 attention": Variant(0.4, "int8", True),
    "75 % pruned, int8": Variant(0.75, "int8"),
    "75 % pruned, int8, int8 attention": Variant(0.75, "int8", True),
}
RIVALS = {
    "fp32": ("openvino", "onnxruntime", "torch_compile"),
    # torch.compile's int8 is no backend of ours: torch's fused int8 modules run op by op.
    "int8": ("openvino", "onnxruntime"),
}
# Variant -> how many times faster than the best rival it has to be at B=1.
GOALS = {
    "fp32": 1.3,
    "dense int8": 1.8,
    "40 % pruned, int8": 3.0,
    "40 % pruned, int8, int8 attention": 3.0,
    "75 % pruned, int8": 5.0,
    "75 % pruned, int8, int8 attention": 5.0,
}
LARGE_BATCH_GOALS = {name: 3.0 for name in GOALS if name.startswith("40 %")}
THROUGHPUT_GOALS = LARGE_BATCH_GOALS
TAIL_GOAL = 1.5  # p99 over p50 at B=1, on an idle machine
THROUGHPUT_ROUNDS = 7
REQUESTS = 4


def request(config: RankerConfig, batch: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Full histories: L and m of the configuration."""
    draw = torch.Generator().manual_seed(seed)

    def ids(high: int, columns: int) -> torch.Tensor:
        return torch.randint(1, high, (batch, columns), generator=draw)

    history, candidates = config.history_length, 50
    return (
        ids(config.n_items, history),
        ids(config.n_categories, history),
        ids(config.n_behaviours, history),
        torch.full((batch,), history),
        ids(config.n_items, candidates),
        ids(config.n_categories, candidates),
    )


def variant(base: Ranker, sparsity: float | None, attention: bool = False) -> Ranker:
    """A copy of the model, pruned and quantised, its attention too where so asked."""
    model = Ranker(base.config).eval()
    model.load_state_dict(base.state_dict())
    if sparsity is None:
        return model
    if sparsity:
        fastrec.prune_(model, fastrec.BlockPruning(sparsity=sparsity))
    int8 = fastrec.Int8(attention=attention)
    fastrec.quantize_(model, int8, calibration=[request(base.config, 4, seed=1)])
    return model


def linear_operations(engine: Engine, batch: int) -> float:
    """Kept multiply-adds of the int8 layers of one call, counted twice."""
    rows = engine.describe()
    return 2.0 * sum(row.get("macs") or 0 for row in rows if row.get("op") == "sparse_int8_linear")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    threads: Annotated[int, typer.Option(help="Threads a call may use.")] = 2,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,64",
    seconds: Annotated[float, typer.Option(help="Of measuring, a batch size.")] = 20.0,
    saturated: Annotated[
        float, typer.Option(help="Seconds of saturation, an engine and round; 0: none.")
    ] = 1.0,
) -> None:
    """Measure the variants and their rivals at each batch size."""
    console = Console(stderr=True)
    torch.manual_seed(0)
    base = Ranker(RankerConfig.taobao()).eval()
    models = {name: variant(base, v.sparsity, v.attention) for name, v in VARIANTS.items()}
    rows: list[dict[str, Any]] = []
    throughput: list[dict[str, Any]] = []
    for batch in map(int, batches.split(",")):
        examples = request(base.config, batch, seed=2)
        engines: dict[str, Engine] = {}
        for name, model in models.items():
            engines[name] = fastrec.compile(model, examples, "native", threads)
        refused = {}
        for precision, backends in RIVALS.items():
            for backend in backends:
                label = f"{backend} {precision}"
                try:
                    engines[label] = fastrec.compile(
                        base, examples, backend, threads, precision=precision
                    )
                except FastrecError as error:
                    refused[label] = str(error)
        console.print(f"B={batch}: {', '.join(engines)}")
        inputs = [
            tuple(t.numpy() for t in request(base.config, batch, seed=10 + i))
            for i in range(REQUESTS)
        ]
        taken = interleaved(
            engines,
            inputs,
            rounds=25,
            calls=max(4, 20 // batch),
            warm_s=0.01,
            seconds_budget=seconds,
        )
        rows += _rows(engines, taken, batch)
        rows += [{"engine": name, "batch": batch, "why": why} for name, why in refused.items()]
        if batch == 1 and saturated > 0:
            console.print("saturated")
            throughput = saturate(engines, inputs, saturated)
        for engine in engines.values():
            engine.close()
        gc.collect()
    ceilings = Ceilings(threads, 0.1)
    report = {
        "machine": machine_card(),
        "threads": threads,
        "int8_peak_gops": ceilings.peak("int8"),
        "machine_tail": machine_tail(),
        "rows": rows,
        "throughput": throughput,
    }
    _judge(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ranker.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (out / "ranker.md").write_text(text)
    Console().print(text, markup=False)


def _rows(
    engines: dict[str, Engine], taken: dict[str, Samples], batch: int
) -> list[dict[str, Any]]:
    rows = []
    for name, samples in taken.items():
        row: dict[str, Any] = {
            "engine": name,
            "batch": batch,
            "ms": {q: getattr(samples, f"{q}_ms") for q in ("p50", "p95", "p99")},
            "settings": [r for r in engines[name].describe() if r.get("chosen")],
            "why": None,
        }
        if name in VARIANTS:
            precision = VARIANTS[name].precision
            rivals = [n for n in taken if n not in VARIANTS and n.endswith(precision)]
            if rivals:
                best = min(rivals, key=lambda n: taken[n].p50_ms)
                gain = ratio(taken[best], samples)
                row["faster"] = {"than": best, "x": gain.value, "ci95": [gain.low, gain.high]}
            row["int8_operations"] = linear_operations(engines[name], batch)
        rows.append(row)
    return rows


def machine_tail(loops: int = 2000) -> float:
    """p99 over p50 of a loop of arithmetic on one thread: what the machine itself interrupts."""
    taken = []
    for _ in range(loops):
        start = time.perf_counter_ns()
        for _ in range(20_000):  # some 0.3 ms
            pass
        taken.append(time.perf_counter_ns() - start)
    return float(np.percentile(taken, 99) / np.percentile(taken, 50))


def saturate(
    engines: dict[str, Engine],
    inputs: list[tuple[np.ndarray, ...]],
    seconds: float,
    rounds: int = THROUGHPUT_ROUNDS,
) -> list[dict[str, Any]]:
    """Requests per second of each engine with every core busy, round by round."""
    names = [n for n in engines if not n.startswith("torch_compile")]  # it has no such mode
    rates: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for i in order.permutation(len(names)):
            time.sleep(SETTLE_S)
            rates[names[i]].append(engines[names[i]].throughput(inputs, seconds=seconds))
    # As times, so that a ratio is taken as everywhere else: of medians, paired by round.
    taken = {
        name: Samples(np.array([[round(1e9 / rate)] for rate in found], np.int64))
        for name, found in rates.items()
    }
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "engine": name,
            "rps": float(np.median(rates[name])),
            "rps_rounds": rates[name],
        }
        rivals = [n for n in names if n not in VARIANTS]
        if name in VARIANTS:
            rivals = [n for n in rivals if n.endswith(VARIANTS[name].precision)]
            if rivals:
                best = max(rivals, key=lambda n: np.median(rates[n]))
                gain = ratio(taken[best], taken[name])
                row["faster"] = {"than": best, "x": gain.value, "ci95": [gain.low, gain.high]}
        rows.append(row)
    return rows


def _judge(report: dict[str, Any]) -> None:
    peak = report["int8_peak_gops"]
    for row in report["throughput"]:
        goal = THROUGHPUT_GOALS.get(row["engine"])
        if goal is not None and "faster" in row:
            row["goal"] = goal
            row["verdict"] = "reached" if row["faster"]["x"] >= goal else "missed"
    for row in report["rows"]:
        if row["batch"] == 1 and row["engine"] in VARIANTS:
            tail = row["ms"]["p99"] / row["ms"]["p50"]
            verdict = "reached" if tail <= TAIL_GOAL else "missed"
            row["tail"] = {"x": tail, "goal": TAIL_GOAL, "verdict": verdict}
        if row.get("int8_operations") and peak and "faster" in row:
            row["peak_share"] = row["int8_operations"] / (row["ms"]["p50"] * 1e6) / peak
            row["at_peak"] = row["faster"]["x"] / row["peak_share"]
        goal = (GOALS if row["batch"] == 1 else LARGE_BATCH_GOALS).get(row["engine"])
        if goal is None or "faster" not in row:
            continue
        row["goal"] = goal
        row["verdict"] = "reached" if row["faster"]["x"] >= goal else "missed"
    operations = {r["engine"]: r["int8_operations"] for r in report["rows"]
                  if r["batch"] == 1 and r.get("int8_operations")}  # fmt: skip
    for row in report["throughput"]:
        if row["engine"] in operations and peak and "faster" in row:
            share = operations[row["engine"]] * row["rps"] / 1e9 / peak
            row["at_peak"] = row["faster"]["x"] / share


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        "# The canonical ranker, one request at a time",
        "",
        f"{machine['cpu']}, {report['threads']} threads; commit {machine.get('commit')}; int8 peak "
        f"of the threads together {report['int8_peak_gops']:.0f} GOPS. Random weights; L=100, 50 "
        "candidates. Share of peak: the int8 layers' kept operations over the whole call's time. "
        "At peak: how many times faster than the best rival the call would be if those operations "
        "took the peak's time and all else none: a goal beyond is out of reach on this machine. "
        "The tail's goal, p99 over p50, is for an idle machine: on this one, a loop of arithmetic "
        f"on one thread had {report['machine_tail']:.2f}. Int8 attention: scores and weighted sums "
        "are integers too (`Int8(attention=True)`), in the other int8 rows they are fp32; rivals "
        "keep theirs as they quantise it.",
        "",
        "| B | engine | p50 ms | p99 ms | p99 / p50 | faster than the best rival | goal | share of "
        "peak | at peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if row["why"]:
            lines.append(
                f"| {row['batch']} | {row['engine']} | not timed: {row['why']} | | | | | | |"
            )
            continue
        gain, goal, share, tail = _gain(row), "", "", ""
        if "tail" in row:
            found = row["tail"]
            tail = f"{found['x']:.2f}, <= {found['goal']:g}: {found['verdict']}"
        if "goal" in row:
            goal = f">= {row['goal']:g}: {row['verdict']}"
        if "peak_share" in row:
            share = f"{row['peak_share']:.0%}"
        ms = row["ms"]
        lines.append(
            f"| {row['batch']} | {row['engine']} | {ms['p50']:.3f} | {ms['p99']:.3f} | {tail} | "
            f"{gain} | {goal} | {share} | {_at_peak(row)} |"
        )
    if report["throughput"]:
        lines += [
            "",
            "Saturated, one user a request, as many at once as there are threads; each engine in "
            "its own mode for that (OpenVINO: THROUGHPUT hint, a stream a thread, async queue):",
            "",
            "| engine | requests/s | faster than the best rival | goal | at peak |",
            "|---|---|---|---|---|",
        ]
    for row in report["throughput"]:
        goal = f">= {row['goal']:g}: {row['verdict']}" if "goal" in row else ""
        lines.append(
            f"| {row['engine']} | {row['rps']:,.0f} | {_gain(row)} | {goal} | {_at_peak(row)} |"
        )
    return "\n".join([*lines, ""])


def _at_peak(row: dict[str, Any]) -> str:
    return f"{row['at_peak']:.2f}x" if "at_peak" in row else ""


def _gain(row: dict[str, Any]) -> str:
    if "faster" not in row:
        return ""
    found = row["faster"]
    low, high = found["ci95"]
    return f"{found['x']:.2f}x [{low:.2f}, {high:.2f}] {found['than']}"


if __name__ == "__main__":
    typer.run(main)

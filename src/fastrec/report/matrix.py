"""``fastrec bench --engines all``: do all engines answer alike, and how fast are they?

The five variants of a ranker with random weights, on every engine that can run here, each engine
built once a variant and called at batch {1, 8} x history {1, 50, 100} x candidates {1, 50}, and on
more requests of the largest size for the top 10 of 50. The reference is torch on the same variant.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fastrec
from fastrec.errors import ArgumentError, ShapeError
from fastrec.exporters.model_spec import quantised_module, spec_of
from fastrec.measure.machine import machine_card, usable_cpus
from fastrec.measure.timing import interleaved
from fastrec.models import Ranker, RankerConfig
from fastrec.report.engines import attempt, third_party_output
from fastrec.report.layout import ENGINE_TITLES
from fastrec.report.schema import VARIANTS
from fastrec.report.settings import Progress
from fastrec.runtime import BACKENDS, Engine, available_backends

_TOP = 10
_EXAMPLE = {"B": 2, "L": 100, "m": 50}
_TIMED = {"B": 1, "L": 100, "m": 50}
# Engines whose sizes are all free where asked for; others decide for themselves.
_FREE = ("onnxruntime", "openvino", "litert")
_ONE_CHIP = "prepared for one chip and one size, in float16: docs/engines/qnn.md has its figures"
_ONE_SHAPE = "compiles each size anew, a minute a size: time it with `fastrec bench MODEL`"


def grid(config: RankerConfig) -> list[dict[str, int]]:
    """Batch x history x candidates."""
    longest = config.history_length
    lengths = sorted({1, (longest + 1) // 2, longest})
    sizes = itertools.product((1, 8), lengths, (1, 50))
    return [{"B": batch, "L": length, "m": m} for batch, length, m in sizes]


def variants(config: RankerConfig, seed: int = 0) -> dict[str, nn.Module]:
    """The five variants; pruned in one round, because weights are random anyway."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        baseline = Ranker(config).eval()
        student = Ranker(config.student()).eval()
    pruned = copy.deepcopy(baseline)
    fastrec.prune_(pruned, fastrec.BlockPruning(sparsity=0.4, rounds=1))
    spec = spec_of(baseline, ())
    drawn = [spec.sample({"B": 8, "m": 50}, seed=seed + i) for i in range(4)]
    calibration = [tuple(map(torch.from_numpy, request)) for request in drawn]
    made: dict[str, nn.Module] = {"baseline": baseline, "pruned": pruned, "distilled": student}
    for name, model in (("quantized", baseline), ("pruned_quantized", pruned)):
        made[name] = copy.deepcopy(model)
        fastrec.quantize_(made[name], fastrec.Int8(), calibration)
    return {name: made[name] for name in VARIANTS}


def matrix(
    *,
    config: RankerConfig | None = None,
    engines: Sequence[str] | None = None,
    only: Sequence[str] = VARIANTS,
    requests: int = 200,
    seconds_per_engine: float = 2.0,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build, compare and time.

    Args:
        config: of the ranker; None = the canonical one.
        engines: names of backends; None = all.
        only: the variants wanted.
        requests: users beyond the grid whose top 10 of 50 is compared.
        seconds_per_engine: timing budget of one engine on one variant.
        threads: of each engine; None = all CPUs of this process.
        seed: of weights and requests.
        progress: called with (stage, done, total).

    Returns:
        ``{"machine", "threads", "rows": [{"variant", "engine", "precision", "largest_error",
        "same_top_10", "users", "sizes", "ms", "why", "settings"}]}``: the largest absolute error,
        the share of users with the same ten of 50 best, how many users and sizes of the grid that
        is from, and the quietest round's median milliseconds at B=1; null where ``why`` says so.

    Raises:
        ArgumentError: an unknown engine or variant, or no request.
    """
    names = tuple(engines or BACKENDS)
    if set(names) - set(BACKENDS):
        raise ArgumentError("engines", f"names among {', '.join(BACKENDS)}", names)
    if set(only) - set(VARIANTS):
        raise ArgumentError("only", f"names among {', '.join(VARIANTS)}", only)
    if requests < 1:
        raise ArgumentError("requests", "a positive integer", requests)
    config = RankerConfig.taobao() if config is None else config
    threads = threads or usable_cpus()
    reasons = available_backends() | {"torch_compile": _ONE_SHAPE, "qnn": _ONE_CHIP}
    rows: list[dict[str, Any]] = []
    made = {name: model for name, model in variants(config, seed).items() if name in only}
    with tempfile.TemporaryDirectory(prefix="fastrec-matrix-") as folder:
        log = Path(folder) / "third_party.log"
        for done, (variant, model) in enumerate(made.items()):
            built: dict[str, Engine] = {}
            refused = {name: reasons[name] for name in names if reasons[name] is not None}
            for name in names:
                if name in refused:
                    continue
                if progress is not None:
                    progress(f"{variant}: {name}", done, len(made))
                with third_party_output(log):
                    built[name], why = attempt("building it failed", _build, model, name, threads)
                if why is not None:
                    del built[name]
                    refused[name] = why
            rows += _compared(variant, model, built, refused, requests, seed)
            _time(built, rows, model, seconds_per_engine, variant)
            for engine in built.values():
                engine.close()
    return {"machine": machine_card(), "threads": threads, "rows": rows}


def _build(model: nn.Module, name: str, threads: int) -> Engine:
    config = model.config
    assert isinstance(config, RankerConfig)
    examples = spec_of(model, ()).sample(_clipped(_EXAMPLE, config))
    settings = {"free_sizes": "all"} if name in _FREE else None
    return fastrec.compile(model, examples, name, threads, settings=settings)


def _clipped(sizes: Mapping[str, int], config: RankerConfig) -> dict[str, int]:
    return {**sizes, "L": min(sizes["L"], config.history_length)}


def _compared(
    variant: str,
    model: nn.Module,
    built: Mapping[str, Engine],
    refused: Mapping[str, str | None],
    requests: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A row an engine, still without times."""
    config = model.config
    assert isinstance(config, RankerConfig)
    spec = spec_of(model, ())
    cases = grid(config)
    largest = cases[-1]
    extra = [largest] * -(-requests // largest["B"])
    worst = dict.fromkeys(built, 0.0)
    same: dict[str, list[bool]] = {name: [] for name in built}
    sizes = dict.fromkeys(built, 0)
    for number, case in enumerate((*cases, *extra)):
        request = spec.sample(case, seed=seed + 100 + number)
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, request)).numpy()
        for name, engine in built.items():
            try:
                scores = engine(*request)
            except ShapeError:  # an engine of one size
                continue
            sizes[name] += number < len(cases)
            worst[name] = max(worst[name], float(np.abs(scores - expected).max()))
            if case["m"] > _TOP:
                tops = zip(_best(expected), _best(scores), strict=True)
                same[name] += [set(a) == set(b) for a, b in tops]
    precision = "fp32" if quantised_module(model) is None else "int8"
    rows = []
    for name in (*built, *refused):
        row = dict.fromkeys(("largest_error", "same_top_10", "users", "sizes", "ms", "settings"))
        if name in built:
            engine = built[name]
            row |= {
                "largest_error": worst[name] if sizes[name] or same[name] else None,
                "same_top_10": float(np.mean(same[name])) if same[name] else None,
                "users": len(same[name]),
                "sizes": sizes[name],
                "settings": [r["setting"] for r in engine.describe() if r.get("chosen")],
            }
        about = {"variant": variant, "engine": name, "precision": precision}
        rows.append(about | row | {"why": refused.get(name)})
    return rows


def _best(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:, :_TOP]


def _time(
    built: Mapping[str, Engine],
    rows: list[dict[str, Any]],
    model: nn.Module,
    seconds: float,
    variant: str,
) -> None:
    """Put ``ms`` into the variant's rows: engines take turns on one request."""
    config = model.config
    assert isinstance(config, RankerConfig)
    request = spec_of(model, ()).sample(_clipped(_TIMED, config), seed=9)
    timed = {}
    for name, engine in built.items():
        try:
            engine(*request)
        except ShapeError as error:
            _row(rows, variant, name)["why"] = str(error)
            continue
        timed[name] = engine
    if not timed:
        return
    taken = interleaved(
        timed, [request], rounds=12, calls=4, seconds_budget=seconds * len(timed), warm_s=0.01
    )
    for name, samples in taken.items():
        _row(rows, variant, name)["ms"] = samples.best_round_ms


def _row(rows: list[dict[str, Any]], variant: str, name: str) -> dict[str, Any]:
    return next(r for r in rows if (r["variant"], r["engine"]) == (variant, name))


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    same = row["same_top_10"]
    return [
        row["variant"],
        ENGINE_TITLES[row["engine"]],
        row["precision"],
        shown(row["largest_error"], ".2g"),
        "-" if same is None else f"{100 * same:.2f} %",
        shown(row["users"], "d"),
        shown(row["sizes"], "d"),
        shown(row["ms"], ".2f"),
    ]


HEADINGS = (
    "variant",
    "engine",
    "precision",
    "largest error",
    "same top 10",
    "users",
    "sizes",
    "ms",
)


def print_matrix(report: Mapping[str, Any], console: Console) -> None:
    """The rows as a table; reasons below."""
    table = Table(title="Agreement with torch, and speed at B=1")
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place < 3 else "right")
    for row in report["rows"]:
        if row["why"] is None:
            table.add_row(*_cells(row))
    console.print(table)
    for engine, why in _reasons(report).items():
        console.print(f"  - {engine}: {why}", style="dim")


def _reasons(report: Mapping[str, Any]) -> dict[str, str]:
    """One line an engine that has no row, or a variant of it."""
    found: dict[str, str] = {}
    for row in report["rows"]:
        if row["why"] is not None:
            found.setdefault(f"{ENGINE_TITLES[row['engine']]} ({row['variant']})", row["why"])
    by_reason: dict[tuple[str, str], list[str]] = {}
    for label, why in found.items():
        engine, variant = label.rsplit(" (", 1)
        by_reason.setdefault((engine, why), []).append(variant.rstrip(")"))
    every = len(VARIANTS)
    return {
        engine if len(names) == every else f"{engine} ({', '.join(names)})": why
        for (engine, why), names in by_reason.items()
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The results page."""
    card = report["machine"]
    lines = [
        "# One compressed model on every engine",
        "",
        "The canonical ranker with random weights in its five variants, each engine built once a",
        "variant. Errors are absolute, against torch on the same variant, over batch {1, 8} x",
        "history {1, 50, 100} x candidates {1, 50} (`sizes`: how many of these twelve the engine",
        "takes once built) and further requests; `same top 10`: users whose ten best of 50 are",
        "the same set. `ms`: one user, 100 events, 50 candidates, the quietest of up to 12",
        "interleaved rounds. Goals: fp32 error <= 1e-4; int8 the same top 10 in >= 99.5 %.",
        "Against the engines' own quantisers: [engines.md](engines.md).",
        "",
        f"{card['cpu']}, {', '.join(card['isa'])}; {report['threads']} threads; "
        + ", ".join(f"{k} {v}" for k, v in card["packages"].items())
        + f"; {card['date']}. Made by `fastrec bench --engines all --out docs/results`.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|" + "---|" * len(HEADINGS),
    ]
    lines += [f"| {' | '.join(_cells(r))} |" for r in report["rows"] if r["why"] is None]
    reasons = _reasons(report)
    if reasons:
        lines += ["", "Not measured:", ""]
        lines += [f"- {engine}: {why}" for engine, why in reasons.items()]
    return "\n".join(lines) + "\n"

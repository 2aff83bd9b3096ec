"""``accelerate``: one call from a torch model to an engine, with a table of before and after."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from fastrec.compress import Int8, QuantizeReport, quantize_, sensitivity
from fastrec.compress.selection import check_model
from fastrec.errors import ArgumentError, DtypeError, FallbackWarning, FastrecError
from fastrec.exporters.trace import first_line
from fastrec.measure.machine import usable_cpus
from fastrec.measure.timing import Interval, interleaved, ratio
from fastrec.runtime import Engine, compile
from fastrec.search.answers import Answers, Evaluate
from fastrec.terminal import stdout

Progress = Callable[[str, int, int], None]
RIVALS = ("onnxruntime", "openvino")
_TURN_S = 0.03
TORCH, OURS, INT8 = "torch", "fastrec", "fastrec INT8"


@dataclass(frozen=True)
class Way:
    """One way to run the model: a row of the table.

    Args:
        name: backend and precision.
        p50_ms: of a call on the examples; None where there is no engine.
        speedup: over torch, with a 95 % interval.
        kept: share of torch's answers; see :func:`accelerate`.
        quality: by ``evaluate``, of the torch model that it was made of.
        weights_mb: parameters and buffers of that model, in 10^6 bytes.
        chosen: whether its engine is the one returned.
        why: what stood in its way.
    """

    name: str
    p50_ms: float | None = None
    speedup: Interval | None = None
    kept: float | None = None
    quality: float | None = None
    weights_mb: float | None = None
    chosen: bool = False
    why: str = ""


@dataclass(frozen=True)
class Accelerated:
    """Result of :func:`accelerate`.

    Args:
        engine: the fastest that keeps the answers; called like the model.
        model: the torch model that it runs: the INT8 copy, or the one that was given.
        ways: torch first, then every way that was tried.
        report: what ``quantize_`` did to ``model``; None where that stayed float.
    """

    engine: Engine
    model: nn.Module
    ways: list[Way]
    report: QuantizeReport | None

    def table(self) -> Table:
        """The ways as a table for ``rich.print``."""
        judged = any(way.quality is not None for way in self.ways)
        shown = Table(title=f"{type(self.model).__name__}, threads: {self.engine.threads}")
        shown.add_column("", no_wrap=True)
        for head in ("ms", "times faster", "quality" if judged else "kept", "MB"):
            shown.add_column(head, justify="right", no_wrap=True)
        shown.add_column("")
        for way in self.ways:
            speedup = way.speedup
            quality = way.quality if judged else way.kept
            cells = [
                "" if way.p50_ms is None else f"{way.p50_ms:.3f}",
                "" if speedup is None
                else f"{speedup.value:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]",
                "" if quality is None else f"{quality:.4g}" if judged else f"{quality:.1%}",
                "" if way.weights_mb is None else f"{way.weights_mb:.1f}",
                "; ".join(filter(None, ("taken" if way.chosen else "", escape(way.why)))),
            ]  # fmt: skip
            shown.add_row(way.name, *cells, style="bold" if way.chosen else None)
        return shown


def accelerate(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    calibration: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    keep: float = 0.99,
    threads: int | None = None,
    rivals: Sequence[str] = RIVALS,
    seconds: float = 5.0,
    show: bool = True,
    progress: Progress | None = None,
) -> Accelerated:
    """Quantise what keeps the answers, compile, and compare with torch and others.

    Nothing is pruned or replaced, and ``model`` is not changed. All layers are made INT8 first;
    where that loses too much, the layers that cost most stay float, as few as keep the answers.

    Args:
        model: any torch model.
        example_inputs: one batch like those to come; see :func:`fastrec.compile`. Timed on.
        calibration: batches for INT8's ranges; see :func:`fastrec.quantize_`. Of four or more, the
            last quarter judges and is not calibrated on. None = the examples alone do both.
        evaluate: model -> quality, the higher the better. Called in eval mode without gradients.
            None = answers are compared with torch's: the best m / 5 (from 1 to 10) of a request's m
            scores lead the average; how much of that lead do the new best have, by torch's scores?
            Scores of a model that gives one for each row are compared over all rows.
        keep: share of the quality, or of the answers, that INT8 has to keep.
        threads: threads a call may use; None means all CPUs of this process.
        rivals: other backends to build and time, in fp32 and in their own INT8. An engine of theirs
            is returned where it is the fastest in fp32.
        seconds: of timing.
        show: print the table.
        progress: called with (stage, stages done, stages in all).

    Returns:
        engine, model and table. A way that cannot be built stands in the table with the reason.

    Raises:
        ArgumentError, DtypeError, ShapeError, IdRangeError: a bad argument, example or batch.
        BackendError: torch itself cannot run the model on the examples.
    """
    model = check_model(model)
    if evaluate is not None and not callable(evaluate):
        raise DtypeError("evaluate", "a callable model -> quality", type(evaluate).__name__)
    if not 0 < keep <= 1:
        raise ArgumentError("keep", "a share, above 0 and at most 1", keep)
    batches = [example_inputs] if calibration is None else list(calibration)
    if not batches:
        raise ArgumentError("calibration", "at least one batch", "none")
    held = len(batches) // 4
    tell = progress or (lambda stage, done, stages: None)
    tell("quantising", 0, 3)
    answers = Answers(model, batches[-held:] if held else batches, evaluate, keep)
    small, report, why = _quantised(model, batches[: len(batches) - held], answers)
    tell("compiling", 1, 3)
    count = usable_cpus() if threads is None else threads
    engines = {TORCH: compile(model, example_inputs, TORCH, count)}
    ways = {name: Way(name) for name in (TORCH, OURS, INT8)}
    wanted: dict[str, tuple[nn.Module, str, str | None]] = {OURS: (model, "native", None)}
    if small is None:
        ways[INT8] = Way(INT8, why=why)
    else:
        wanted[INT8] = (small, "native", None)
    for rival in rivals:
        wanted |= {rival: (model, rival, None), f"{rival} INT8": (model, rival, "int8")}
    for name, (network, backend, precision) in wanted.items():
        engine, reason = _built(network, example_inputs, backend, precision, count, batches)
        ways[name] = Way(name, why=reason or (why if name == INT8 else ""))
        if engine is not None:
            engines[name] = engine
    tell("timing", 2, 3)
    ways = _timed(engines, ways, example_inputs, seconds)
    for name, engine in engines.items():
        ways[name] = _judged(ways[name], engine, small if name == INT8 else model, answers)
    best = min(
        (name for name in engines if name == INT8 or not name.endswith("INT8")),
        key=lambda name: ways[name].p50_ms or 0.0,
    )
    ways[best] = dataclasses.replace(ways[best], chosen=True)
    for name, engine in engines.items():
        if name != best:
            engine.close()
    tell("done", 3, 3)
    taken = small if best == INT8 and small is not None else model
    result = Accelerated(
        engines[best], taken, list(ways.values()), report if taken is small else None
    )
    if show:
        stdout().print(result.table())
    return result


def _quantised(
    model: nn.Module, batches: Sequence[Any], answers: Answers
) -> tuple[nn.Module | None, QuantizeReport | None, str]:
    """The INT8 model that keeps the answers with as few float layers as that takes, and which those
    are; or None, and why."""

    def of(layers: list[str] | None) -> tuple[nn.Module, QuantizeReport]:
        copied = copy.deepcopy(model).eval()
        return copied, quantize_(copied, Int8(), batches, layers)

    try:
        whole, report = of(None)
        lost = answers.lost(whole)
        if lost is None:
            return whole, report, ""
        found = sensitivity(
            copy.deepcopy(model), answers.loss,
            quantize=Int8(), calibration=batches, filter_fn=[*report.layers, *report.tables],
        ).layers  # fmt: skip
        order = sorted(found, key=lambda name: found[name].quantized or 0.0)
        best: tuple[nn.Module, QuantizeReport] | None = None
        fits, fails = 0, len(order)  # of the layers, the least sensitive first
        while fails - fits > 1:
            count = (fits + fails) // 2
            tried = of(order[:count])
            if answers.lost(tried[0]) is None:
                best, fits = tried, count
            else:
                fails = count
    except FastrecError as error:
        return None, None, first_line(error)
    if best is None:
        return None, None, f"{lost}, and no part of the layers keeps them"
    return *best, f"float to keep the answers: {', '.join(order[fits:])}"


def _built(
    model: nn.Module,
    examples: Any,
    backend: str,
    precision: str | None,
    threads: int,
    batches: Sequence[Any],
) -> tuple[Engine | None, str]:
    """The engine, or why there is none; with an engine, what falls back to torch in it."""
    given = (
        None if precision is None else [b.inputs() if hasattr(b, "inputs") else b for b in batches]
    )
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", FallbackWarning)
            engine = compile(
                model, examples, backend, threads, precision=precision, calibration=given
            )
    except FastrecError as error:
        return None, first_line(error)
    return engine, "; ".join(str(w.message) for w in told if w.category is FallbackWarning)


def _timed(
    engines: Mapping[str, Engine], ways: dict[str, Way], examples: Any, seconds: float
) -> dict[str, Way]:
    named = isinstance(examples, Mapping)

    def call(engine: Engine) -> Callable[[], Any]:
        return (lambda: engine(**examples)) if named else (lambda: engine(*examples))

    calls = {name: call(engine) for name, engine in engines.items()}
    # The slowest spin of idle workers, between turns. A turn is long enough for an engine's threads
    # to wake and its data to be in the caches: ONNX Runtime and OpenVINO take twice as long else.
    spin = max(engine.spin_s for engine in engines.values())
    once = interleaved(calls, [()], rounds=1, calls=2, settle_s=spin)
    counts = {n: min(max(round(_TURN_S * 1e3 / t.p50_ms), 2), 40) for n, t in once.items()}
    taken = interleaved(
        calls, [()],
        rounds=100, calls=counts, warm_s=_TURN_S, settle_s=spin, seconds_budget=seconds,
    )  # fmt: skip
    return {
        name: way if name not in taken else dataclasses.replace(
            way, p50_ms=taken[name].p50_ms, speedup=ratio(taken[TORCH], taken[name])
        )
        for name, way in ways.items()
    }  # fmt: skip


def _judged(way: Way, engine: Engine, model: nn.Module | None, answers: Answers) -> Way:
    assert model is not None
    own = way.name == INT8 or not way.name.endswith("INT8")
    kept: float | None
    try:
        kept = answers.kept_by(engine)
    except FastrecError:  # it takes the examples' sizes alone, on which it was checked
        kept = answers.kept_by(model) if own else None
    if not own:
        return dataclasses.replace(way, kept=kept)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return dataclasses.replace(
        way, kept=kept, quality=answers.quality_of(model), weights_mb=size / 1e6
    )

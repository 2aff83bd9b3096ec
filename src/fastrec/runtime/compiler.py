"""``fastrec.compile``: one model, one batch of examples, an engine of the backend asked for."""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrec.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    FallbackWarning,
    FastrecError,
    MissingDependencyError,
)
from fastrec.exporters.flat import flattened
from fastrec.exporters.model_spec import Dims, as_tensors, quantised_module, spec_of
from fastrec.exporters.trace import evaluated, first_line, owned
from fastrec.measure.choice import choice, contest
from fastrec.measure.machine import usable_cpus
from fastrec.measure.packages import missing
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.models import RankerConfig, SASRecConfig
from fastrec.nn import Int8Embedding
from fastrec.runtime.backends import BACKENDS, backend_module
from fastrec.runtime.backends._torch import TorchEngine, inference
from fastrec.runtime.choice_cache import choice_file, recall, remember
from fastrec.runtime.engine import PLAN, PRECISIONS, BuildOptions, Engine
from fastrec.runtime.threads import with_torch_threads
from fastrec.runtime.unlike import LookUps, require_agreement
from fastrec.spec import InputSpec

FALLBACKS = ("torch", "error")
_EXTRA = {
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "litert": "litert",
    "qnn": "qnn",
}
_READS_THE_MODEL = ("torch", "torch_compile", "openvino")
# Backends that "auto" leaves to those who ask for them.
_BY_NAME = {"qnn": "prepares the model for one chip, in float16: ask for it by name"}


def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    backend: str = "auto",
    threads: int | None = None,
    *,
    precision: str | None = None,
    calibration: Iterable[Sequence[Any]] | None = None,
    settings: dict[str, Any] | None = None,
    fallback: str = "torch",
    dims: Dims | None = None,
    limits: Mapping[str, int] | None = None,
) -> Engine:
    """Build an engine; all compiling, quantising and choosing of settings happens here.

    Args:
        model: a torch model; it is not changed. Its result may be a tensor, or tuples, lists and
            dicts of tensors, each of which has the batch first or does not depend on it.
        example_inputs: one batch like those to come: a tuple of the positional arguments, or a dict
            of the named ones. Beside tensors and arrays they may hold lists, dicts, dataclasses,
            None and numbers; the engine is called with the same structure, and gives the model's.
            Numbers are constants. float64 is computed in float32. Engines of onnxruntime and
            openvino keep every size but the batch; settings are chosen by measuring on it.
        backend: ``auto``, or one of :data:`fastrec.runtime.BACKENDS`. ``auto`` builds all that can
            run, discards those whose answers differ from torch's and keeps the fastest on the
            examples; its ``describe()`` says why. The choice is remembered for this machine, model,
            size and versions; ``settings={"measure": "again"}`` makes it anew.
        threads: threads a call may use; None means all CPUs of this process.
        precision: ``fp32``, ``bf16``, ``int8``, or None for the model as it is. int8 here is the
            backend's own quantiser, for comparison; native runs what ``fastrec.quantize_`` made.
        calibration: batches for backends that quantise by calibration (openvino); the examples by
            default.
        settings: a backend's own settings, forced instead of chosen; see its page in the docs.
        fallback: what native does with a model that is no one plan: ``torch`` runs what no plan
            holds in torch (``describe()`` and a FallbackWarning tell it), the rest as plans where
            that is faster; ``error`` raises what is lacking.
        dims: for models that are not fastrec's, sizes of native engines that stay free beside the
            batch ``"B"``, by input: ``{"item": ("B", "L"), "cand": ("B", "m")}``, where the batch
            may also stand elsewhere than first: ``{"offsets": (3, "B")}``. One name is one
            size wherever it appears. What the model's code specialises on is fixed all the same.
        limits: the most of a free size, ``{"L": 100}``: a model that slices a table of positions
            needs it said.

    Raises:
        ArgumentError, DtypeError, ShapeError, IdRangeError: a bad argument or example.
        BackendError: the backend is unknown, cannot run, lacks the precision, cannot take this
            model, or its answers differ from torch's; the message names choices and reasons.
        MissingDependencyError: the backend's package is not installed.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError("model", "a torch.nn.Module", type(model).__name__)
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if precision is not None and precision not in PRECISIONS:
        raise ArgumentError("precision", f"one of {PRECISIONS} or None", repr(precision))
    if fallback not in FALLBACKS:
        raise ArgumentError("fallback", f"one of {FALLBACKS}", repr(fallback))
    threads = usable_cpus() if threads is None else threads
    if not isinstance(threads, int) or threads < 1:
        raise ArgumentError("threads", "a positive integer or None", threads)
    if not isinstance(example_inputs, tuple | list | Mapping) or not example_inputs:
        expected = "a tuple of inputs, or a dict of named ones"
        raise DtypeError("example_inputs", expected, type(example_inputs).__name__)
    own = isinstance(getattr(model, "config", None), RankerConfig | SASRecConfig)
    if own and not isinstance(example_inputs, Mapping):
        # Names an id outside its table before torch meets it.
        spec_of(model, ()).check(as_tensors("example_inputs", example_inputs))
    model, examples, structure = flattened(model, example_inputs)
    spec = spec_of(model, examples, dims, limits)
    spec.check(examples)
    requests: list[tuple[np.ndarray, ...]] = []
    for request in calibration or ():
        tensors = as_tensors(
            "calibration", request if structure is None else structure.tensors(request)
        )
        requests.append(tuple(spec.check(tensors)[0]))
    options = BuildOptions(threads, precision, requests, spec, dict(settings or {}))
    if fallback == "error" and backend == "native":
        options.settings.setdefault("executor", "plan")
    reference, bounded = _reference(model, examples, spec)
    if backend == "auto":
        engine = _auto(model, examples, options, reference, bounded)
    else:
        engine = _build(backend, model, examples, options, reference, bounded)
    if backend == "native":
        _tell_fallback(engine)
    engine.structure = structure
    return engine


def _tell_fallback(engine: Engine) -> None:
    """Warn where the native backend leaves a model, or parts of it, to torch."""
    rows = engine.describe()
    why = [r["why"] for r in rows if r.get("setting") == PLAN and not (r["chosen"] or r["p50_ms"])]
    if not why:
        return
    plans = sum(row.get("setting") == "plan" for row in rows)
    if plans:
        text = f"this model is no one native plan: {plans} hold parts of it, torch runs the rest"
    else:
        text = "this model is no native plan and runs op by op in torch"
    ops = [row["why"] for row in rows if row.get("setting") == "torch"]
    if ops and why[0].startswith("native: "):
        why = []  # the same ops
    told = "; ".join(dict.fromkeys(why + ops))
    warnings.warn(f"{text}: {told}", FallbackWarning, stacklevel=3)


def available_backends() -> dict[str, str | None]:
    """Backend -> None where it can run here, else the reason why not."""
    return {name: backend_module(name).can_run() for name in BACKENDS}


def _reference(
    model: nn.Module, examples: tuple[torch.Tensor, ...], spec: InputSpec
) -> tuple[np.ndarray, InputSpec]:
    """torch's scores, and the spec with the ranges of the ids that are looked up in a table."""
    ready = evaluated(model)
    seen = LookUps(examples)
    hooks = [seen.watch(m) for m in ready.modules() if isinstance(m, Int8Embedding)]
    try:
        with torch.inference_mode(), seen:
            output = ready(*examples)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, torch.Tensor):
        raise DtypeError("model", "a model with one tensor output", type(output).__name__)
    scores: np.ndarray = inference(lambda: output)().numpy()
    return scores, seen.bounded(spec)


def _build(
    name: str,
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    options: BuildOptions,
    reference: np.ndarray,
    bounded: InputSpec,
) -> Engine:
    module = backend_module(name)
    if (reason := module.can_run()) is not None:
        if name in _EXTRA and missing(name):
            raise MissingDependencyError(name, _EXTRA[name], f"backend {name!r}")
        raise BackendError(f"backend {name!r} cannot run: {reason}")
    if options.precision is not None and options.precision not in module.PRECISIONS:
        raise BackendError(
            f"backend {name!r} has no {options.precision}: it has {', '.join(module.PRECISIONS)}"
        )
    # Native kernels check their ids themselves, in the pass that reads them.
    own = options if name == "native" else dataclasses.replace(options, spec=bounded)
    try:
        # Those read the model's own memory; the others write or pack it.
        given = owned(model) if name in _READS_THE_MODEL else model
        engine = module.build(given, examples, own)
        if isinstance(engine, TorchEngine):
            engine.spec = dataclasses.replace(engine.spec, fields=bounded.fields)
        scores = engine(*examples).numpy()
    except (FastrecError, MemoryError):
        raise
    except Exception as error:  # of a library below, which may raise anything
        why = first_line(error)
        raise BackendError(f"backend {name!r} cannot take this model: {why}") from error
    tolerance = Tolerance()  # re-quantised: whether that is good enough is the caller's to judge
    if engine.precision == "fp32":
        tolerance = Tolerance.for_precision("fp32")
    elif options.precision is None and engine.precision != "int8":
        tolerance = Tolerance.for_precision(engine.precision)  # a model in 16 bits
    elif options.precision is None:
        # The same int8 model: a float's last bit may turn a rounding, by one step of 255.
        tolerance = Tolerance(noise=0.1)
    correctness_gate(reference, scores, tolerance).require(f"backend {name!r}")
    batch = options.spec.sizes([t.shape for t in examples]).get("B")
    if batch is not None and options.precision != "int8":
        forward = partial(with_torch_threads, options.threads, inference(evaluated(model)))
        require_agreement(name, engine, forward, examples, batch, engine.precision)
    return engine


def _auto(
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    options: BuildOptions,
    reference: np.ndarray,
    bounded: InputSpec,
) -> Engine:
    """The engine remembered for these, or the fastest of all, which is then remembered."""
    measure = options.setting("measure", ("once", "again"), "once")
    options.settings.pop("measure", None)
    file, holds_for = choice_file(model, examples, options)
    lost: list[dict[str, Any]] = []
    found = recall(file, holds_for) if measure == "once" else None
    if found is not None:
        name = found["backend"]
        try:
            engine = _agreeing(name, model, examples, options, reference, bounded)
        except FastrecError as error:  # it was right before: measure again, and say why
            lost = [choice(f"{name}, remembered", False, None, str(error))]
        else:
            why = f"measured {found['date']} on this machine, for this model, size and versions"
            engine._rows = [choice("auto", True, None, why), *found["rows"], *engine._rows]
            return engine
    engine, rows = _measured(model, examples, options, reference, bounded)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    remember(file, holds_for, engine.backend, rows, date)
    engine._rows = [*rows, *lost, *engine._rows]
    return engine


def _measured(
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    options: BuildOptions,
    reference: np.ndarray,
    bounded: InputSpec,
) -> tuple[Engine, list[dict[str, Any]]]:
    """Build all that can run, drop what disagrees with torch, time the rest; rows that say so."""
    engines: dict[str, Engine] = {}
    rows: list[dict[str, Any]] = []
    quantised = quantised_module(model)
    for name in BACKENDS:
        if quantised is not None and name == "torch_compile":
            rows.append(choice(name, False, None, f"{quantised} runs on fastrec's kernels only"))
            continue
        if name in _BY_NAME:
            rows.append(choice(name, False, None, _BY_NAME[name]))
            continue
        try:
            engines[name] = _agreeing(name, model, examples, options, reference, bounded)
        except FastrecError as error:
            rows.append(choice(name, False, None, str(error)))
    if not engines:
        reasons = "; ".join(f"{row['setting']}: {row['why']}" for row in rows)
        raise BackendError(f"no backend can run this model: {reasons}")
    best, taken = contest(engines, examples)
    why = f"measured on the example inputs, B={len(examples[0])}, checked against torch"
    rows = [
        # The figure that the choice was made by.
        choice(name, name == best, taken[name], why) | {"p50_ms": round(taken[name].quiet_ms, 4)}
        for name in engines
    ] + rows
    for name, engine in engines.items():
        if name != best:
            engine.close()
    return engines[best], rows


def _agreeing(
    name: str,
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    options: BuildOptions,
    reference: np.ndarray,
    bounded: InputSpec,
) -> Engine:
    """The backend's engine, whatever its precision as close to torch as that precision allows.

    Raises:
        FastrecError: it cannot be built, or its answers differ too much.
    """
    engine = _build(name, model, examples, options, reference, bounded)
    tolerance = Tolerance.for_precision(engine.precision)
    gate = correctness_gate(reference, engine(*examples).numpy(), tolerance)
    if not gate.passed:
        engine.close()
    gate.require(f"backend {name!r}")
    return engine

"""``sensitivity``: the loss increase from pruning or quantising each layer alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastrec.compress.calibration import calibrate, leave_unfit
from fastrec.compress.fake_quant import FakeQuantEmbedding, fake_quant_twin
from fastrec.compress.int8_candidates import check_float32, unsupported
from fastrec.compress.int8_config import Int8
from fastrec.compress.layers import computes_linear, weight_obstacle, weight_of
from fastrec.compress.patterns import BlockPruning, Pruning
from fastrec.compress.pruning import prune_
from fastrec.compress.selection import (
    FilterFn,
    Layers,
    as_filter,
    bypassed_children,
    check_model,
    is_table,
    set_module,
)
from fastrec.compress.take_apart import take_apart_
from fastrec.errors import ArgumentError, DtypeError
from fastrec.plotting import BLUE, ORANGE, figure, png
from fastrec.train.evaluation import evaluating

Evaluate = Callable[[nn.Module], float]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: its class, number of weights, and the loss increase when it alone is pruned or
    quantised (None: not measured)."""

    kind: str
    weights: int
    pruned: float | None = None
    quantized: float | None = None


@dataclass(frozen=True)
class SensitivityReport:
    """Result of :func:`sensitivity`: the unchanged model's loss, and each layer's increase."""

    baseline: float
    layers: dict[str, LayerSensitivity] = field(default_factory=dict)

    def too_sensitive(self, limit: float, technique: str | None = None) -> list[str]:
        """Names of the layers whose loss rises by more than ``limit``.

        Args:
            limit: in the unit of ``evaluate``.
            technique: "pruned" or "quantized"; None: either of them.
        """
        if not isinstance(limit, int | float) or math.isnan(limit):
            raise ArgumentError("limit", "a number", repr(limit))
        if technique not in (None, "pruned", "quantized"):
            raise ArgumentError("technique", "'pruned', 'quantized' or None", repr(technique))
        names = ("pruned", "quantized") if technique is None else (technique,)
        return [
            name
            for name, layer in self.layers.items()
            if any((getattr(layer, n) or 0.0) > limit for n in names)
        ]

    def keep(self, limit: float, technique: str | None = None) -> FilterFn:
        """A ``filter_fn`` for ``prune_`` and ``quantize_``: the layers measured, without those that
        are :meth:`too_sensitive`.

        Raises:
            ArgumentError: none is left.
        """
        left = set(self.layers) - set(self.too_sensitive(limit, technique))
        if not left:
            raise ArgumentError("limit", "a limit that leaves at least one layer", limit)
        return lambda module, name: name in left

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self) -> str:
        """The layers as text, the most sensitive first."""
        width = max((len(name) for name in self.layers), default=5)
        rows = [f"{'layer':{width}}  {'kind':22} {'weights':>10} {'pruned':>12} {'quantized':>12}"]
        for name, layer in self._ranked():
            values = [f"{'' if v is None else f'{v:+.5g}':>12}" for v in self._pair(layer)]
            rows.append(f"{name:{width}}  {layer.kind:22} {layer.weights:10,} {' '.join(values)}")
        return "\n".join(rows)

    def plot(self, path: str | os.PathLike[str] | None = None) -> bytes:
        """Bars of each layer's rise as PNG, also written to ``path``.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        ranked = self._ranked()[::-1]
        made, (axes,) = figure(8, 1 + 0.3 * len(ranked))
        bars = (("pruned", BLUE, 0.2), ("quantized", ORANGE, -0.2))
        for technique, colour, shift in bars:
            rises = [getattr(layer, technique) for _, layer in ranked]
            if any(rise is not None for rise in rises):
                places = [y + shift for y in range(len(ranked))]
                shown = [math.nan if rise is None else rise for rise in rises]
                axes.barh(places, shown, 0.4, color=colour, label=technique)
        axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
        axes.set_xlabel(f"rise of the loss (untouched: {self.baseline:.5g})")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.legend()
        return png(made, path)

    def _ranked(self) -> list[tuple[str, LayerSensitivity]]:
        return sorted(
            self.layers.items(), key=lambda item: -max((v or 0.0) for v in self._pair(item[1]))
        )

    @staticmethod
    def _pair(layer: LayerSensitivity) -> tuple[float | None, float | None]:
        return layer.pruned, layer.quantized


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    prune: Pruning | None = None,
    quantize: Int8 | None = None,
    calibration: Iterable[Any] | None = None,
    filter_fn: Layers | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Prune and quantise one layer at a time, without fine-tuning, and measure the loss increase.

    Costs one evaluation a layer and technique, and one for the untouched model. ``model`` is as
    before afterwards, and also where something fails.

    Args:
        model: any torch model.
        evaluate: model -> loss, the lower the better; for a metric, return its negative. Called in
            eval mode without gradients. A few hundred examples rank the layers well enough.
        prune: how each layer is pruned (in one round), or None.
        quantize: how each is quantised (weights and input, simulated), or None.
        calibration: batches for the inputs' ranges; see :func:`quantize_`. Needed by ``quantize``.
        filter_fn: which layers; see :func:`prune_`. Default: all linear layers and tables that are
            called as modules.
        progress: called with (layer, layers done, layers in all).

    Raises:
        ArgumentError: neither ``prune`` nor ``quantize``, no calibration, no layer, or a loss that
            is not a finite number.
    """
    model = check_model(model)
    if not callable(evaluate):
        raise DtypeError("evaluate", "a callable model -> loss", type(evaluate).__name__)
    if prune is None and quantize is None:
        raise ArgumentError("prune", "a BlockPruning, or quantize=Int8()", "neither")
    if quantize is not None and calibration is None:
        raise ArgumentError("calibration", "an iterable of input batches", None)
    apart = take_apart_(model)
    try:
        return _measured(model, evaluate, prune, quantize, calibration, filter_fn, progress)
    finally:
        apart.put_back()


def _measured(
    model: nn.Module,
    evaluate: Evaluate,
    prune: Pruning | None,
    quantize: Int8 | None,
    calibration: Iterable[Any] | None,
    filter_fn: Layers | None,
    progress: Progress | None,
) -> SensitivityReport:
    chosen = as_filter(model, filter_fn, _can)
    bypassed = bypassed_children(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if _can(module) and id(module) not in bypassed and (chosen is None or chosen(module, name))
    }
    if not layers:
        raise ArgumentError("model", "linear layers or tables that filter_fn selects", "none")
    twins = {} if quantize is None else _twins(model, layers, quantize, calibration or ())
    with evaluating(model):
        baseline = _loss(evaluate, model, "the untouched model")
        found: dict[str, LayerSensitivity] = {}
        for number, (name, module) in enumerate(layers.items(), 1):
            rises: dict[str, float] = {}
            if prune is not None and _prunable(module, prune):
                with _pruned(model, name, module, prune):
                    rises["pruned"] = _loss(evaluate, model, name) - baseline
            if name in twins:
                with _swapped(model, name, module, twins[name]):
                    rises["quantized"] = _loss(evaluate, model, name) - baseline
            weights = weight_of(module).numel()
            found[name] = LayerSensitivity(type(module).__name__, weights, **rises)
            if progress is not None:
                progress(name, number, len(layers))
    return SensitivityReport(baseline, found)


def _can(module: nn.Module) -> bool:
    return computes_linear(module) or is_table(module)


def _loss(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    value = float(evaluate(model))
    if not math.isfinite(value):
        raise ArgumentError("evaluate", "a finite loss", f"{value} for {what}")
    return value


def _prunable(module: nn.Module, config: Pruning) -> bool:
    if weight_obstacle(module) is not None:
        return False
    if is_table(module):
        return getattr(config, "embedding_block", None) is not None
    return isinstance(config, BlockPruning) or weight_of(module).shape[-1] % config.m == 0


@contextmanager
def _pruned(model: nn.Module, name: str, module: nn.Module, config: Pruning) -> Iterator[None]:
    weight = weight_of(module)
    before = weight.detach().clone()
    try:
        prune_(model, config, lambda m, n: m is module)
        yield
    finally:
        weight.data.copy_(before)


@contextmanager
def _swapped(model: nn.Module, name: str, module: nn.Module, twin: nn.Module) -> Iterator[None]:
    set_module(model, name, twin.eval())
    try:
        yield
    finally:
        set_module(model, name, module)


def _twins(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: Int8,
    calibration: Iterable[Any],
) -> dict[str, nn.Module]:
    """Fake-quantised versions of the layers that the calibration batches call."""
    left = unsupported(model, config.embeddings, trains=True)
    linears = {name: m for name, m in layers.items() if computes_linear(m) and name not in left}
    tables = {
        name: m
        for name, m in layers.items()
        if isinstance(m, nn.Embedding) and config.embeddings and name not in left
    }
    for name, layer in {**linears, **tables}.items():
        check_float32(name, layer)
    seen = calibrate(model, linears, tables, calibration)
    leave_unfit(linears, tables, seen)
    twins: dict[str, nn.Module] = {}
    for name, layer in linears.items():
        twins[name] = twin = fake_quant_twin(layer, averaging=0.0)
        twin.set_range(*seen.observers[name].range(config.calibration_method, config.percentile))
    return twins | {name: FakeQuantEmbedding.from_float(t) for name, t in tables.items()}

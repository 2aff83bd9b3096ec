"""``quantize_``: static INT8 with calibration, and quantisation-aware training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastrec.compress.calibration import calibrate, leave_uncalled, observed_scores
from fastrec.compress.fake_quant import (
    WEIGHT_LEVELS,
    FakeQuant,
    FakeQuantEmbedding,
    fake_quant_twin,
    row_scales,
)
from fastrec.compress.fusion import Fusion, plan_fusions
from fastrec.compress.int8_attention import (
    Attending,
    attend_in_int8,
    can_attend_in_int8,
    why_not,
)
from fastrec.compress.layers import KINDS, as_dense, computes_linear
from fastrec.compress.observers import METHODS, RangeObserver, affine_u8
from fastrec.compress.selection import (
    FilterFn,
    Layers,
    as_filter,
    bypassed_children,
    check_fraction,
    check_model,
    is_table,
    named_layers,
    set_module,
)
from fastrec.compress.serving_numerics import match_serving_numerics_
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import (
    Int8Embedding,
    LowRankLinear,
    SeparableInt8Projection,
    SeparableProjection,
    SparseInt8Linear,
)

MIN_OUTPUTS = 16  # narrower layers (a final score) cost nothing in float and would lose accuracy
_FLOAT_ONLY = (nn.modules.conv._ConvNd, nn.RNNBase)
_CALLS = "_fastrec_calls"  # in a module's __dict__ during QAT
MIN_TABLE_ROWS = 1000  # smaller tables (positions, behaviours) are no bytes and one more step


@dataclass(frozen=True)
class Int8:
    """Static INT8: u8 activations with calibrated ranges, s8 weights with one scale an output.

    Args:
        calibration_method: how the range of an activation is chosen from the calibration batches.
            "minmax" keeps every value; "percentile" lets what lies beyond ``percentile`` saturate;
            "mse" shrinks the range to the least squared error. The last two resist outliers.
        percentile: in (50, 100], of each side.
        embeddings: whether tables become INT8 too (one scale a row).
        levels: the largest code of a weight, 1 to 127. 127 uses all of int8. Fewer cost precision
            and no time, and the artifact stores codes by their entropy: 31 take about 5.6 bits
            each in place of 7.6.
        fuse: whether a ReLU or GELU behind a layer goes into its kernel, and layers that feed each
            other hand on uint8.
        attention: whether scores and weighted sums of attention are integers too, in
            ``WindowSparseAttention`` and the attention of ``fastrec.models``: q and k with
            calibrated ranges; v with the dynamic range of each call in the former (the paper's
            Value branch), a calibrated one in the latter, whose projections then write bytes. Not
            with QAT.
    """

    calibration_method: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    embeddings: bool = True
    fuse: bool = True
    attention: bool = False
    levels: int = WEIGHT_LEVELS

    def __post_init__(self) -> None:
        if type(self.levels) is not int or not 1 <= self.levels <= WEIGHT_LEVELS:
            raise ArgumentError("levels", f"an integer, 1 to {WEIGHT_LEVELS}", self.levels)
        if self.calibration_method not in METHODS:
            raise ArgumentError(
                "calibration_method", f"one of {METHODS}", repr(self.calibration_method)
            )
        check_fraction("percentile", self.percentile, low=50.0, high=100.000001)


@dataclass(frozen=True)
class QAT:
    """Quantisation-aware training in two calls.

    ``quantize_(model, QAT("prepare"))`` swaps in layers that round as INT8 does in the forward
    pass and train in full precision; train as usual; ``quantize_(model, QAT("convert"))`` swaps in
    the INT8 modules with the learned ranges.

    Args:
        step: "prepare" or "convert".
        averaging: weight of the newest batch in the moving average of an activation's range.
        calibration_method: for the initial ranges where ``calibration`` is passed with "prepare".
        percentile: see :class:`Int8`.
        embeddings: see :class:`Int8`.
        fuse: see :class:`Int8`.
        levels: see :class:`Int8`; of "prepare", and "convert" keeps to it.
    """

    step: Literal["prepare", "convert"] = "prepare"
    averaging: float = 0.01
    calibration_method: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    embeddings: bool = True
    fuse: bool = True
    levels: int = WEIGHT_LEVELS

    def __post_init__(self) -> None:
        if self.step not in ("prepare", "convert"):
            raise ArgumentError("step", "'prepare' or 'convert'", repr(self.step))
        check_fraction("averaging", self.averaging, high=1.000001)
        Int8(self.calibration_method, self.percentile, levels=self.levels)  # checks them

    @classmethod
    def like(cls, ranges: Int8, step: Literal["prepare", "convert"]) -> QAT:
        """QAT with the choices of a static configuration."""
        return cls(
            step,
            calibration_method=ranges.calibration_method,
            percentile=ranges.percentile,
            embeddings=ranges.embeddings,
            fuse=ranges.fuse,
            levels=ranges.levels,
        )


@dataclass(frozen=True)
class LinearReport:
    """One quantised layer: its input's scale and zero point, the activation in its kernel, the
    dtype it hands on and the share of 4-input groups that its kernel computes."""

    x_scale: float
    x_zero_point: int
    activation: str | None
    output: str
    density: float


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_` did: quantised layers and tables, and those that were left in float
    because they could not be replaced, with the reason. After QAT's "prepare", ``prepared`` names
    the fake-quantised modules. ``attention`` names those whose scores are integers."""

    layers: dict[str, LinearReport] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


def quantize_(
    model: nn.Module,
    config: Int8 | QAT | None = None,
    calibration: Iterable[Any] | None = None,
    filter_fn: Layers | None = None,
) -> QuantizeReport:
    """Quantise ``model`` in place: ``nn.Linear`` and ``GroupedLinear`` -> ``SparseInt8Linear``,
    ``SeparableProjection`` -> ``SeparableInt8Projection``, ``nn.Embedding`` -> ``Int8Embedding``.

    Weights pruned to zero in whole groups of 4 inputs x 32 outputs are dropped from the kernel's
    work. In an ``nn.Sequential``, a ReLU or GELU behind a layer moves into its kernel (an
    ``nn.Identity`` stays in its place, so indices hold), and a layer that feeds the next quantised
    one hands on uint8 with that one's scale, so the chain is integer from end to end. Norms become
    :class:`fastrec.nn.LayerNorm`, which rounds as the native engine does in inference, and so does
    the attention of ``fastrec.models``: the integers evaluated are then the integers served.

    Args:
        model: any torch model; its layers must be called as modules.
        config: :class:`Int8` (default) or :class:`QAT`.
        calibration: iterable of batches: tuples of the model's inputs, single tensors, mappings, or
            objects with ``.inputs()`` such as ``SequenceBatch``. A few hundred typical examples are
            enough. Needed by Int8; optional for QAT's prepare; unused by its convert.
        filter_fn: which layers and tables: names of layers (or of modules: all layers inside),
            compiled regular expressions that match full names, or (module, name) -> bool.
            Default: layers of at least 16 outputs and tables of at least 1000 rows.

    Raises:
        ArgumentError: a name that no layer has, nothing selected, no calibration, NaN or infinity
            in weights or activations. The model is untouched then.
    """
    check_model(model)
    config = Int8() if config is None else config
    attention = isinstance(config, Int8) and config.attention

    def can(module: nn.Module) -> bool:
        attends = attention and can_attend_in_int8(module)
        return computes_linear(module) or is_table(module) or attends

    filter_fn = as_filter(model, filter_fn, can)
    if isinstance(config, QAT):
        if config.step == "convert":
            return _convert(model, config)
        return _prepare(model, config, calibration, filter_fn or _default_filter)
    if not isinstance(config, Int8):
        raise DtypeError("config", "an Int8 or a QAT", type(config).__name__)
    return _static(model, config, calibration, filter_fn or _default_filter)


def _default_filter(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings >= MIN_TABLE_ROWS
    return module.out_features >= MIN_OUTPUTS


def _static(
    model: nn.Module, config: Int8, calibration: Iterable[Any] | None, filter_fn: FilterFn
) -> QuantizeReport:
    linears, tables = _selected(model, config.embeddings, filter_fn)
    if calibration is None:
        raise ArgumentError(
            "calibration",
            "an iterable of input batches, e.g. dataset.batches('train', batch_size=32, limit=256)",
            None,
        )
    attention = _attention(model, filter_fn) if config.attention else {}
    with observed_scores(attention) as scores:
        seen = calibrate(model, linears, tables, calibration)
    left = unsupported(model, config.embeddings)
    left |= leave_uncalled(linears, tables, seen)
    fusions = plan_fusions(model, _chained(linears), seen.runs_whole) if config.fuse else {}
    swaps: dict[str, nn.Module] = {}
    for name, layer in linears.items():
        low, high = seen.observers[name].range(config.calibration_method, config.percentile)
        scale, zero_point = _qparams(low, high)
        dense = as_dense(layer)
        packed = SparseInt8Linear.from_float(
            dense,
            x_scale=scale,
            x_zero_point=zero_point,
            activation=fusions.get(name, Fusion()).activation,
            w_scale=row_scales(dense.weight, config.levels),
        )
        swaps[name] = _int8_form(layer, packed)
    swaps |= {n: Int8Embedding.from_float(table, config.levels) for n, table in tables.items()}
    becoming = [linears[n] for n, new in swaps.items() if isinstance(new, SparseInt8Linear)]
    steps: dict[str, tuple[float, ...]] = {}
    for name, observers in scores.items():
        why = why_not(attention[name], becoming)
        if any(o.calls == 0 for o in observers):
            why = "q, k and v are projected apart, or it was never called"
        if why is None:
            steps[name] = tuple(_signed(o, config) for o in observers)
        else:
            left[name] = why
    report = _swap(model, swaps, fusions, left, steps)
    return dataclasses.replace(report, attention=list(steps))


def _attention(model: nn.Module, filter_fn: FilterFn) -> dict[str, Attending]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, Attending)
        and can_attend_in_int8(m)
        and name
        and (filter_fn is _default_filter or filter_fn(m, name))
    }


def _signed(observer: RangeObserver, config: Int8) -> float:
    """The step of int8 around zero."""
    low, high = observer.range(config.calibration_method, config.percentile)
    largest = max(-float(low), float(high))
    return largest / 127 if largest > 1e-20 else 1.0


def _prepare(
    model: nn.Module, config: QAT, calibration: Iterable[Any] | None, filter_fn: FilterFn
) -> QuantizeReport:
    linears, tables = _selected(model, config.embeddings, filter_fn)
    left = unsupported(model, config.embeddings)
    seen = None
    if calibration is not None:
        seen = calibrate(model, linears, tables, calibration)
        left |= leave_uncalled(linears, tables, seen)
    twins: dict[str, nn.Module] = {}
    for name, layer in linears.items():
        twins[name] = twin = fake_quant_twin(layer, config.averaging, config.levels)
        if seen is not None:
            twin.set_range(
                *seen.observers[name].range(config.calibration_method, config.percentile)
            )
    twins |= {n: FakeQuantEmbedding.from_float(t, config.levels) for n, t in tables.items()}
    for name, module in twins.items():
        set_module(model, name, module)
    for module in model.modules():
        if isinstance(module, nn.Sequential | LowRankLinear | FakeQuant):
            module.register_forward_pre_hook(_note_call)
    return QuantizeReport(prepared=[*linears, *tables], left=left)


def _note_call(module: nn.Module, args: Any) -> None:
    """On whatever calls layers in a chain during QAT: convert fuses only what was called whole."""
    module.__dict__[_CALLS] = module.__dict__.get(_CALLS, 0) + 1


def _convert(model: nn.Module, config: QAT) -> QuantizeReport:
    twins = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuant)}
    tables = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantEmbedding)}
    if not twins and not tables:
        raise ArgumentError(
            "model", "a model that quantize_(model, QAT('prepare')) has prepared", "one without"
        )
    for name, layer in {**twins, **tables}.items():
        _check_finite(name, layer)

    def called_whole(parent: str, layers: list[str]) -> bool:
        calls = [model.get_submodule(n).__dict__.get(_CALLS, 0) for n in (parent, *layers)]
        return calls[0] > 0 and len(set(calls)) == 1

    fusions = plan_fusions(model, _chained(twins), called_whole) if config.fuse else {}
    swaps: dict[str, nn.Module] = {}
    for name, twin in twins.items():
        scale, zero_point = twin.checked_qparams(name)
        dense, w_scale = twin.as_float()
        packed = SparseInt8Linear.from_float(
            dense,
            x_scale=float(scale),
            x_zero_point=int(zero_point),
            activation=fusions.get(name, Fusion()).activation,
            w_scale=w_scale,
        )
        swaps[name] = _int8_form(twin, packed)
    for name, table in tables.items():
        swaps[name] = Int8Embedding.from_float(table.as_float(), table.levels)
    for module in model.modules():
        module.__dict__.pop(_CALLS, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _note_call:
                del module._forward_pre_hooks[key]
    return _swap(model, swaps, fusions, {})


def _chained(layers: Mapping[str, nn.Module]) -> list[str]:
    """Those whose INT8 form reads uint8: taps are float."""
    return [n for n, layer in layers.items() if not isinstance(layer, SeparableProjection)]


def _int8_form(layer: nn.Module, packed: SparseInt8Linear) -> nn.Module:
    if isinstance(layer, SeparableProjection):
        return SeparableInt8Projection.from_float(layer, packed)
    return packed


def _selected(
    model: nn.Module, embeddings: bool, filter_fn: FilterFn
) -> tuple[dict[str, nn.Module], dict[str, nn.Embedding]]:
    bypassed = bypassed_children(model)
    linears = {
        name: m
        for name, m in named_layers(model, computes_linear, filter_fn)
        if id(m) not in bypassed
    }
    tables = {
        name: m
        for name, m in (named_layers(model, is_table, filter_fn) if embeddings else ())
        if isinstance(m, nn.Embedding) and m.max_norm is None
    }
    if not linears and not tables:
        raise ArgumentError(
            "model",
            f"a module holding nn.Linear layers (by default of at least {MIN_OUTPUTS} outputs) or "
            "tables that filter_fn selects",
            "none",
        )
    if "" in linears or "" in tables:
        raise ArgumentError(
            "model", "a module that holds the layers: wrap it in nn.Sequential", "a single layer"
        )
    for name, layer in {**linears, **tables}.items():
        _check_finite(name, layer)
    return linears, tables


def unsupported(model: nn.Module, embeddings: bool) -> dict[str, str]:
    """Layers with weights that have no INT8 form here, by name, with the reason."""
    bypassed = bypassed_children(model)
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            left[name] = "torch's attention reads its weights itself; see WindowSparseAttention"
        elif isinstance(module, _FLOAT_ONLY):
            left[name] = f"{type(module).__name__} has no INT8 form"
        elif isinstance(module, KINDS):
            if id(module) in bypassed:
                left[name] = "its parent reads its weight without calling it"
            elif not computes_linear(module):
                kind = next(k.__name__ for k in KINDS if isinstance(module, k))
                left[name] = f"{type(module).__name__} computes something else than {kind}"
        elif embeddings and isinstance(module, nn.Embedding):
            if not is_table(module):
                left[name] = f"{type(module).__name__} computes something else than nn.Embedding"
            elif module.max_norm is not None:
                left[name] = "max_norm changes the table while it is read"
    return left


def _check_finite(name: str, layer: nn.Module) -> None:
    for key, parameter in layer.named_parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ArgumentError(f"{name}.{key}", "finite weights", "NaN or infinity")


def _qparams(low: Tensor, high: Tensor) -> tuple[float, int]:
    scale, zero_point = affine_u8(low, high)
    return float(scale), int(zero_point)


def _swap(
    model: nn.Module,
    swaps: Mapping[str, nn.Module],
    fusions: Mapping[str, Fusion],
    left: dict[str, str],
    steps: Mapping[str, Sequence[float]] | None = None,
) -> QuantizeReport:
    """Everything is built before this: from here on nothing can fail half-way."""
    for name, fusion in fusions.items():
        if fusion.consumer is not None:
            consumer = swaps[fusion.consumer]
            swaps[name].set_output_quantization(float(consumer.x_scale), int(consumer.x_zero_point))
        if fusion.activation is not None or fusion.consumer is not None:
            for absorbed in fusion.absorbed:
                set_module(model, absorbed, nn.Identity())
    for name, module in swaps.items():
        set_module(model, name, module.train(model.get_submodule(name).training))
    match_serving_numerics_(model)
    attend_in_int8(model, {} if steps is None else steps)
    packed = {
        name: m.pointwise if isinstance(m, SeparableInt8Projection) else m
        for name, m in swaps.items()
    }
    layers = {
        name: LinearReport(
            float(m.x_scale),
            int(m.x_zero_point),
            m.activation,
            "float32" if m.out_scale is None else "uint8",
            float(m.density),
        )
        for name, m in packed.items()
        if isinstance(m, SparseInt8Linear)
    }
    tables = [name for name, m in swaps.items() if isinstance(m, Int8Embedding)]
    return QuantizeReport(layers=layers, tables=tables, left=left)

"""``quantize_``: static INT8 with calibration, and quantisation-aware training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastrec.compress import qat
from fastrec.compress.calibration import calibrate, leave_unfit
from fastrec.compress.fake_quant import FakeQuant, row_scales
from fastrec.compress.fusion import Fusion, plan_fusions
from fastrec.compress.int8_attention import Attending, can_attend_in_int8, why_not
from fastrec.compress.int8_candidates import (
    MIN_OUTPUTS,
    MIN_TABLE_ROWS,
    default_filter,
    selected,
    unsupported,
)
from fastrec.compress.int8_config import QAT, Int8
from fastrec.compress.int8_swap import LinearReport, QuantizeReport, chained, int8_form, swap_
from fastrec.compress.layers import as_dense, computes_linear
from fastrec.compress.observers import RangeObserver, affine_u8
from fastrec.compress.selection import FilterFn, Layers, as_filter, check_model, is_table
from fastrec.compress.take_apart import take_apart_
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import Int8Embedding, SparseInt8Linear

__all__ = [
    "MIN_OUTPUTS",
    "MIN_TABLE_ROWS",
    "QAT",
    "Int8",
    "LinearReport",
    "QuantizeReport",
    "quantize_",
    "unsupported",
]


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
    ``nn.MultiheadAttention`` becomes :class:`fastrec.nn.MultiheadAttention`, whose projections are
    layers, so its state-dict keys change; for QAT, make the optimiser after "prepare".

    Args:
        model: any torch model. Layers that are not only called as modules, or that have hooks,
            stay float and stand in the report's ``left``.
        config: :class:`Int8` (default) or :class:`QAT`.
        calibration: iterable of batches: tuples of the model's inputs, single tensors, mappings, or
            objects with ``.inputs()`` such as ``SequenceBatch``. A few hundred typical examples are
            enough. Needed by Int8; optional for QAT's prepare; unused by its convert.
        filter_fn: which layers and tables: names of layers (or of modules: all layers inside),
            compiled regular expressions that match full names, or (module, name) -> bool.
            Default: layers of at least 16 outputs and tables of at least 1000 rows.

    Raises:
        ArgumentError: a name that no layer has, nothing selected, no calibration, NaN or infinity
            in weights or activations, dropout that eval mode leaves on. The model is untouched
            then.
        DtypeError: a selected layer that is not float32.
    """
    model = check_model(model)
    config = Int8() if config is None else config
    attention = isinstance(config, Int8) and config.attention

    def can(module: nn.Module) -> bool:
        attends = attention and can_attend_in_int8(module)
        return computes_linear(module) or is_table(module) or attends

    if not isinstance(config, Int8 | QAT):
        raise DtypeError("config", "an Int8 or a QAT", type(config).__name__)
    if isinstance(config, QAT) and config.step == "convert":
        return qat.convert(model, config)
    apart = take_apart_(model)
    try:
        chosen = as_filter(model, filter_fn, can) or default_filter
        found = [m for n, m in model.named_modules() if computes_linear(m) and chosen(m, n)]
        apart.put_back(lambda module: any(module is one for one in found))
        if isinstance(config, QAT):
            report = qat.prepare(model, config, calibration, chosen)
        else:
            report = _static(model, config, calibration, chosen)
    except BaseException:
        apart.put_back()
        raise
    apart.put_back(lambda module: isinstance(module, SparseInt8Linear | FakeQuant))
    return report


def _static(
    model: nn.Module, config: Int8, calibration: Iterable[Any] | None, filter_fn: FilterFn
) -> QuantizeReport:
    linears, tables = selected(model, config.embeddings, filter_fn)
    if calibration is None:
        raise ArgumentError(
            "calibration",
            "an iterable of input batches, e.g. dataset.batches('train', batch_size=32, limit=256)",
            None,
        )
    attention = _attention(model, filter_fn) if config.attention else {}
    seen = calibrate(model, linears, tables, calibration, attention)
    left = unsupported(model, config.embeddings) | leave_unfit(linears, tables, seen)
    fusions = plan_fusions(model, chained(linears), seen.runs_whole) if config.fuse else {}
    swaps: dict[str, nn.Module] = {}
    for name, layer in linears.items():
        low, high = seen.observers[name].range(config.calibration_method, config.percentile)
        dense = as_dense(layer)
        scales = row_scales(dense.weight, config.levels)
        activation = fusions.get(name, Fusion()).activation
        swaps[name] = int8_form(layer, dense, affine_u8(low, high), scales, activation)
    swaps |= {n: Int8Embedding.from_float(table, config.levels) for n, table in tables.items()}
    becoming = [linears[n] for n, new in swaps.items() if isinstance(new, SparseInt8Linear)]
    steps: dict[str, tuple[float, ...]] = {}
    for name, observers in seen.scores.items():
        why = why_not(attention[name], becoming)
        if why is None and any(observer.is_empty for observer in observers):
            why = "q, k and v are projected apart, or it was never called"
        if why is None:
            steps[name] = tuple(_signed(o, config) for o in observers)
        else:
            left[name] = why
    report = swap_(model, swaps, fusions, left, steps)
    return dataclasses.replace(report, attention=list(steps))


def _attention(model: nn.Module, filter_fn: FilterFn) -> dict[str, Attending]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, Attending)
        and can_attend_in_int8(m)
        and name
        and (filter_fn is default_filter or filter_fn(m, name))
    }


def _signed(observer: RangeObserver, config: Int8) -> float:
    """The step of int8 around zero."""
    low, high = observer.range(config.calibration_method, config.percentile)
    largest = max(-float(low), float(high))
    return largest / 127 if largest > 1e-20 else 1.0

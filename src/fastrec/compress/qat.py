"""Quantisation-aware training: fake-quantised layers in, INT8 modules out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastrec.compress.calibration import calibrate, leave_unfit
from fastrec.compress.fake_quant import FakeQuant, FakeQuantEmbedding, fake_quant_twin
from fastrec.compress.fusion import Fusion, plan_fusions
from fastrec.compress.int8_candidates import check_finite, selected, unsupported
from fastrec.compress.int8_config import QAT
from fastrec.compress.int8_swap import QuantizeReport, chained, int8_form, swap_
from fastrec.compress.layers import swap_obstacle
from fastrec.compress.selection import FilterFn, set_module
from fastrec.compress.take_apart import ENCODER_LAYERS
from fastrec.compress.weight_uses import WeightWatch
from fastrec.errors import ArgumentError
from fastrec.nn import Int8Embedding, LowRankLinear

# In modules' __dict__ during QAT: the number of calls, the float layer replaced, and of the model
# the layers whose weight is used outside of their calls.
_CALLS, _ORIGIN, _USES = "_fastrec_calls", "_fastrec_origin", "_fastrec_uses"


def prepare(
    model: nn.Module, config: QAT, calibration: Iterable[Any] | None, filter_fn: FilterFn
) -> QuantizeReport:
    """Swap fake-quantised layers in; see :func:`~fastrec.compress.quantize_`.

    Args:
        model: the float model, in place.
        config: ranges and levels.
        calibration: batches for the initial ranges, or None.
        filter_fn: which layers and tables.
    """
    linears, tables = selected(model, config.embeddings, filter_fn, trains=True)
    left = unsupported(model, config.embeddings, trains=True)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    if calibration is not None:
        seen = calibrate(model, linears, tables, calibration)
        left |= leave_unfit(linears, tables, seen)
        ranges = {
            name: seen.observers[name].range(config.calibration_method, config.percentile)
            for name in linears
        }
    else:
        model.register_forward_pre_hook(_watch_first_call)
    twins: dict[str, nn.Module] = {}
    for name, layer in linears.items():
        twins[name] = twin = fake_quant_twin(layer, config.averaging, config.levels)
        if name in ranges:
            twin.set_range(*ranges[name])
    twins |= {n: FakeQuantEmbedding.from_float(t, config.levels) for n, t in tables.items()}
    for name, module in twins.items():
        module.__dict__[_ORIGIN] = model.get_submodule(name)
        set_module(model, name, module)
    for module in model.modules():
        if isinstance(module, (nn.Sequential, LowRankLinear, FakeQuant, *ENCODER_LAYERS)):
            module.register_forward_pre_hook(_note_call)
    return QuantizeReport(prepared=[*linears, *tables], left=left)


def _note_call(module: nn.Module, args: Any) -> None:
    """Count calls during QAT: convert fuses only the chains that were always called as a whole."""
    module.__dict__[_CALLS] = module.__dict__.get(_CALLS, 0) + 1


def _watch_first_call(model: nn.Module, args: Any) -> None:
    """Pre-hook of a model prepared without calibration: note uses of weights outside of calls."""
    if torch.compiler.is_compiling():
        return
    _remove_hook(model, _watch_first_call)
    layers = _prepared(model)
    watch = WeightWatch(layers, evaluates=False)
    stack = ExitStack()
    stack.enter_context(watch.running(layers))

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        stack.close()
        module.__dict__[_USES] = watch.found

    handle = model.register_forward_hook(stop, always_call=True)


def _remove_hook(module: nn.Module, hook: Any) -> None:
    for key, found in list(module._forward_pre_hooks.items()):
        if found is hook:
            del module._forward_pre_hooks[key]


def _prepared(model: nn.Module) -> dict[str, FakeQuant | FakeQuantEmbedding]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuant | FakeQuantEmbedding)
    }


def _take_back(model: nn.Module, name: str, twin: FakeQuant | FakeQuantEmbedding) -> None:
    """Put the float layer that QAT's "prepare" replaced back, with what was trained."""
    twin.kept_weight()
    layer = twin.__dict__[_ORIGIN]
    for key, parameter in twin.named_parameters(recurse=False):
        setattr(layer, key, parameter)
    set_module(model, name, layer.train(twin.training))


def convert(model: nn.Module, config: QAT) -> QuantizeReport:
    """Swap INT8 modules with the learned ranges in.

    Raises:
        ArgumentError: nothing was prepared, a range was never learned, or a prepared layer has
            hooks. The model is untouched then.
    """
    left: dict[str, str] = model.__dict__.get(_USES, {})
    found = _prepared(model)
    for name, layer in found.items():
        if (obstacle := swap_obstacle(layer)) is not None:
            raise ArgumentError("model", "prepared layers without hooks", f"{name!r}: {obstacle}")
    taken_back = {name: found.pop(name) for name in left}
    twins = {n: m for n, m in found.items() if isinstance(m, FakeQuant)}
    tables = {n: m for n, m in found.items() if isinstance(m, FakeQuantEmbedding)}
    if not twins and not tables and not taken_back:
        raise ArgumentError(
            "model", "a model that quantize_(model, QAT('prepare')) has prepared", "one without"
        )
    for name, layer in {**twins, **tables}.items():
        check_finite(name, layer)

    def called_whole(parent: str, layers: list[str]) -> bool:
        calls = [model.get_submodule(n).__dict__.get(_CALLS, 0) for n in (parent, *layers)]
        return calls[0] > 0 and len(set(calls)) == 1

    fusions = plan_fusions(model, chained(twins), called_whole) if config.fuse else {}
    swaps: dict[str, nn.Module] = {}
    for name, twin in twins.items():
        dense, scales = twin.as_float()
        activation = fusions.get(name, Fusion()).activation
        swaps[name] = int8_form(twin, dense, twin.checked_qparams(name), scales, activation)
    for name, table in tables.items():
        swaps[name] = Int8Embedding.from_float(table.as_float(), table.levels)
    for name, twin_in_use in taken_back.items():
        _take_back(model, name, twin_in_use)
    for module in model.modules():
        for key in (_CALLS, _ORIGIN, _USES):
            module.__dict__.pop(key, None)
        _remove_hook(module, _note_call)
    _remove_hook(model, _watch_first_call)
    return swap_(model, swaps, fusions, left)

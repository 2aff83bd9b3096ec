"""Run calibration batches and record each layer's inputs and calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastrec.compress.int8_attention import Attending
from fastrec.compress.observers import RangeObserver
from fastrec.compress.selection import call_model, reasons
from fastrec.compress.take_apart import ENCODER_LAYERS
from fastrec.compress.weight_uses import uses_outside_calls
from fastrec.errors import ArgumentError
from fastrec.kernels.separable_projection.reference import valid_rows
from fastrec.models.attention import Attention
from fastrec.nn import LowRankLinear, SeparableProjection
from fastrec.nn.separable_projection import depthwise_rows
from fastrec.train.evaluation import evaluating


@dataclass
class Seen:
    """Observations of a calibration run, by layer name."""

    observers: dict[str, RangeObserver]
    calls: dict[str, int]
    outside: dict[str, str]  # layers whose weight is used outside of their call: the reason
    scores: dict[str, tuple[RangeObserver, ...]] = field(default_factory=dict)

    def runs_whole(self, parent: str, layers: list[str]) -> bool:
        """Whether ``layers`` ran exactly when their parent did."""
        return all(self.calls[layer] == self.calls[parent] > 0 for layer in layers)


def calibrate(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    tables: Mapping[str, nn.Embedding],
    calibration: Iterable[Any],
    attention: Mapping[str, Attending] | None = None,
) -> Seen:
    """Run the batches in eval mode and watch the layers.

    The first batch runs twice: once more to find uses of weights outside of the layers' calls.

    Args:
        model: the float model, unchanged afterwards.
        linears: name -> linear layer whose input is observed.
        tables: name -> table whose calls are counted.
        calibration: batches; see :func:`~fastrec.compress.quantize_`.
        attention: name -> attention whose q, k (and v) are observed.

    Raises:
        ArgumentError: no batch, NaN or infinity at a layer's input, dropout on in eval mode,
            or a buffer that changes in it.
    """
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise ArgumentError("calibration", "at least one batch", "an empty iterable")
    with evaluating(model):
        layers = {**linears, **tables}
        outside = uses_outside_calls(model, layers, lambda: call_model(model, first))
    seen = Seen({name: RangeObserver(name) for name in linears}, {}, outside)
    with ExitStack() as stack, evaluating(model):
        seen.scores = stack.enter_context(_observed_scores(attention or {}))
        for name, module in model.named_modules():
            whole = isinstance(module, (nn.Sequential, LowRankLinear, *ENCODER_LAYERS))
            if name in linears or name in tables or whole:
                seen.calls[name] = 0
                hook = _observe(seen, name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for batch in itertools.chain((first,), batches):
            call_model(model, batch)
    return seen


def _observe(seen: Seen, name: str) -> Any:
    observer = seen.observers.get(name)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls[name] += 1
        if observer is None:
            return
        x = args[0] if args else kwargs["x" if "x" in kwargs else "input"]
        if isinstance(module, SeparableProjection):
            # Its INT8 part starts after the depthwise taps.
            lengths = args[1] if len(args) > 1 else kwargs.get("lengths")
            x = depthwise_rows(x, module.depthwise, lengths, module.causal)
            x = x if lengths is None else valid_rows(x, lengths)
        observer.observe(x)

    return hook


@contextmanager
def _observed_scores(
    attention: Mapping[str, Attending],
) -> Iterator[dict[str, tuple[RangeObserver, ...]]]:
    """Watch q and k of each attention, and v where it will be rounded by a calibrated range:
    parts of what the projections return."""
    found: dict[str, tuple[RangeObserver, ...]] = {}

    def hook_of(width: int, observers: Sequence[RangeObserver]) -> Any:
        def hook(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
            for part, observer in enumerate(observers):
                observer.observe(output[..., part * width : (part + 1) * width])

        return hook

    with ExitStack() as stack:
        for name, module in attention.items():
            own = isinstance(module, Attention)
            watched = tuple(RangeObserver(f"{name}: {part}") for part in ("qkv" if own else "qk"))
            if isinstance(module, Attention):
                width, layers = module.n_heads * module.head_dim, module.projections()
            else:
                width, layers = module.num_heads * module.qk_dim, [(module.in_proj, (0, 1))]
            for layer, parts in layers:
                hook = hook_of(width, [watched[part] for part in parts])
                stack.callback(layer.register_forward_hook(hook).remove)
            found[name] = watched
        yield found


def leave_unfit(
    linears: dict[str, nn.Module], tables: dict[str, nn.Embedding], seen: Seen
) -> dict[str, str]:
    """Drop the layers that the batches show to have no INT8 form, or say nothing of.

    Returns:
        name -> reason.

    Raises:
        ArgumentError: no layer is left.
    """
    left = dict(seen.outside)
    for name in [*linears, *tables]:
        observer = seen.observers.get(name)
        if seen.calls[name] == 0:
            left[name] = "never called as a module during calibration"
        elif observer is not None and observer.is_empty:
            left.setdefault(name, "its input was empty in every calibration batch")
        elif observer is not None and observer.is_zero:
            left.setdefault(name, "its input was 0 in every calibration batch")
    layers: dict[str, Any]
    for layers in (linears, tables):
        for name in layers.keys() & left.keys():
            del layers[name]
    if not linears and not tables:
        raise ArgumentError(
            "calibration", "batches that reach the selected layers as calls", reasons(left)
        )
    return left

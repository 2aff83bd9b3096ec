"""Swap INT8 modules in for float ones, and report it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from fastrec.compress.fusion import Fusion
from fastrec.compress.int8_attention import attend_in_int8
from fastrec.compress.selection import set_module
from fastrec.compress.serving_numerics import match_serving_numerics_
from fastrec.nn import (
    Int8Embedding,
    SeparableInt8Projection,
    SeparableProjection,
    SparseInt8Linear,
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
    """Result of :func:`quantize_`: quantised layers and tables, and those that were left in float
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


def chained(layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of the layers whose INT8 form can read uint8; separable projections read floats."""
    return [n for n, layer in layers.items() if not isinstance(layer, SeparableProjection)]


def int8_form(
    layer: nn.Module,
    dense: nn.Linear,
    qparams: tuple[Tensor, Tensor],
    w_scale: Tensor,
    activation: str | None,
) -> nn.Module:
    """The INT8 module in the place of a layer.

    Args:
        layer: one of ``layers.KINDS``, or its fake-quantised twin.
        dense: its weight as a plain layer [N, K].
        qparams: scale f32 [] and zero point i32 [] of the input.
        w_scale: f32 [N], the scale of each output's weights.
        activation: "relu", "gelu" or None, for the kernel.
    """
    packed = SparseInt8Linear.from_float(
        dense,
        x_scale=float(qparams[0]),
        x_zero_point=int(qparams[1]),
        activation=activation,
        w_scale=w_scale,
    )
    if isinstance(layer, SeparableProjection):
        return SeparableInt8Projection.from_float(layer, packed)
    return packed


def swap_(
    model: nn.Module,
    swaps: Mapping[str, nn.Module],
    fusions: Mapping[str, Fusion],
    left: dict[str, str],
    steps: Mapping[str, Sequence[float]] | None = None,
) -> QuantizeReport:
    """Swap the built modules in; from here on nothing can fail half-way.

    Args:
        model: the model, in place.
        swaps: name -> INT8 module.
        fusions: name -> what the module absorbs.
        left: for the report.
        steps: attention -> steps of q, k (and v), where its scores become integers.
    """
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

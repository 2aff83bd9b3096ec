"""The prepared weight and the call of the GPU backends of ``sparse_int8_linear``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastrec.kernels.sparse_int8_linear._cpu import OUT_DTYPES
from fastrec.kernels.sparse_int8_linear._device import DeviceWeight, device_weight
from fastrec.kernels.sparse_int8_linear.packed import PANEL_OUTPUTS, PackedWeight
from fastrec.kernels.sparse_int8_linear.sparsity_2_4 import keeps_two_of_four


@dataclass(frozen=True)
class Prepared:
    """A weight with its epilogue on a device; per-output values padded to whole panels.

    Attributes:
        start: int32; -zero point * sum of the output's weights.
        start_of_signed: the same for inputs of which 128 is taken: (128 - zero point) * sum.
        scale: float32; x_scale * w_scale, rounded once.
        bias: float32; -0 without a bias: adding it changes no value.
    """

    weight: DeviceWeight
    start: torch.Tensor
    start_of_signed: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    activation: str | None
    out_dtype: torch.dtype
    x_zero_point: int
    y_zero_point: int
    x_inverse_scale: float
    y_inverse_scale: float


def _inverse(scale: float) -> float:
    """1 / scale, both rounded to float32."""
    return float(torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32))


def prepare(
    packed: PackedWeight,
    *,
    x_scale: float,
    x_zero_point: int,
    bias: torch.Tensor | None,
    activation: str | None,
    out: str | None,
    out_scale: float | None,
    out_zero_point: int | None,
    backend: str = "cuda",
) -> Prepared:
    """Takes copies of all that it needs; the weight's memory is not borrowed. Only ``cuda`` gains
    from a weight that keeps 2 of every 4 inputs."""
    two_four = backend == "cuda" and keeps_two_of_four(packed)
    weight = device_weight(packed, two_four=two_four)
    size = weight.panels * PANEL_OUTPUTS
    folded_bias = torch.full((size,), -0.0, dtype=torch.float32, device=weight.scale.device)
    if bias is not None:
        folded_bias[: packed.outputs] = bias
    return Prepared(
        weight=weight,
        start=-x_zero_point * weight.sum,
        start_of_signed=(128 - x_zero_point) * weight.sum,
        scale=torch.tensor(x_scale, dtype=torch.float32) * weight.scale,
        bias=folded_bias,
        activation=activation,
        out_dtype=OUT_DTYPES[out],
        x_zero_point=x_zero_point,
        y_zero_point=0 if out_zero_point is None else out_zero_point,
        x_inverse_scale=_inverse(x_scale),
        y_inverse_scale=1.0 if out_scale is None else _inverse(out_scale),
    )


@functools.cache
def _runner(backend: str) -> Callable[[Prepared, torch.Tensor, torch.Tensor], None]:
    module = importlib.import_module(f"fastrec.kernels.sparse_int8_linear._{backend}")
    run: Callable[[Prepared, torch.Tensor, torch.Tensor], None] = module.run
    return run


def call(prepared: Prepared, x: torch.Tensor, backend: str) -> torch.Tensor:
    """x [..., K], checked, on the weight's device -> [..., N]."""
    outputs, inputs = prepared.weight.outputs, prepared.weight.inputs
    y = torch.empty((*x.shape[:-1], outputs), dtype=prepared.out_dtype, device=x.device)
    if y.numel():
        flat = x.reshape(-1, inputs).contiguous()
        _runner(backend)(prepared, flat, y.view(-1, outputs))
    return y

"""The definition of ``activation_quantize`` in pure torch."""

from __future__ import annotations

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels.sparse_int8_linear.reference import quantise


def pre_activation(
    x: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x as float32 (float64 stays); int32 accumulators times scale plus bias, each rounded."""
    if x.dtype is not torch.int32:
        return x if x.dtype is torch.float64 else x.float()
    assert scale is not None
    value = x.float() * scale
    return value if bias is None else value + bias


def activation_quantize_reference(
    x: torch.Tensor,
    activation: str | None = None,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> torch.Tensor:
    """Arguments, results and errors of :func:`fastrec.kernels.activation_quantize`; exact GELU."""
    value = pre_activation(x, scale, bias)
    if activation == "relu":
        value = value.relu()
    elif activation == "gelu":
        value = torch.nn.functional.gelu(value.double()).to(value.dtype)
    if out == "uint8":
        assert out_scale is not None
        if bool(value.isnan().any()):
            raise ArgumentError("x", "numbers", "a NaN")
        return quantise(value.float(), out_scale, out_zero_point)
    return value.bfloat16() if out == "bfloat16" else value

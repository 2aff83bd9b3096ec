"""The definition of ``sparse_int8_linear`` in pure torch."""

from __future__ import annotations

import torch

from fastrec.kernels.sparse_int8_linear.packed import PackedWeight


def quantise(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """float32 -> uint8: clip(round_half_even(x * (1 / scale)) + zero_point, 0, 255).

    The reciprocal and every product is rounded to float32, as in the kernels.
    """
    inverse = torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32)
    clamped = (x * inverse).clamp(-zero_point, 255 - zero_point)
    return (torch.round(clamped) + zero_point).to(torch.uint8)


def accumulate(x_u8: torch.Tensor, weight_s8: torch.Tensor, zero_point: int) -> torch.Tensor:
    """sum_k (x[m, k] - zero_point) * w[n, k] as int32 [M, N], exact.

    In float64, whose 53 bits hold every sum that fits int32.
    """
    shifted = x_u8.double() - zero_point
    return (shifted @ weight_s8.double().T).to(torch.int32)


def sparse_int8_linear_reference(
    x_u8: torch.Tensor,
    packed: PackedWeight,
    *,
    x_scale: float,
    x_zero_point: int,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
) -> torch.Tensor:
    """Same arguments and result as :func:`fastrec.kernels.sparse_int8_linear`."""
    rows = x_u8.reshape(-1, packed.inputs)
    if rows.is_floating_point():
        rows = quantise(rows.float(), x_scale, x_zero_point)
    exact = accumulate(rows, packed.unpack(), x_zero_point)
    scale = torch.tensor(x_scale, dtype=torch.float32) * packed.scale
    value = exact.to(torch.float32) * scale
    if bias is not None:
        value = value + bias
    if activation == "relu":
        value = value.relu()
    elif activation == "gelu":
        value = torch.nn.functional.gelu(value.double()).float()
    if out == "uint8":
        assert out_scale is not None
        assert out_zero_point is not None
        value = quantise(value, out_scale, out_zero_point)
    elif out == "bfloat16":
        value = value.bfloat16()
    return value.reshape(*x_u8.shape[:-1], packed.outputs)

"""Checks of arguments that several ops share."""

from __future__ import annotations

import math

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError

# 1 / scale must be finite in fp32, and so must scale.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126


def check_output_quantisation(out_scale: float, out_zero_point: int) -> None:
    """Raises ArgumentError unless a uint8 output can be made with these."""
    if not (math.isfinite(out_scale) and SMALLEST_SCALE <= out_scale <= LARGEST_SCALE):
        raise ArgumentError("out_scale", "a number in 2**-126 .. 2**126", out_scale)
    if not 0 <= out_zero_point <= 255:
        raise ArgumentError("out_zero_point", "an integer in 0..255", out_zero_point)


def check_like(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], x: torch.Tensor
) -> None:
    """Raises unless the tensor has this dtype and shape and lies on x's device."""
    if tensor.dtype is not dtype:
        raise DtypeError(name, str(dtype).removeprefix("torch."), tensor.dtype)
    if tensor.shape != shape:
        raise ShapeError(name, f"shape {list(shape)}", list(tensor.shape))
    if not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device:
        raise DeviceError(name, f"x's device {x.device}", tensor.device)

"""Checks of arguments that several ops share, and the errors for values that a kernel refuses."""

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


def check_scale(scale: float, name: str = "scale") -> None:
    """Raises ArgumentError unless the factor of the scores is finite."""
    if not math.isfinite(scale):
        raise ArgumentError(name, "a finite number", scale)


def check_like(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    x: torch.Tensor,
    owner: str = "x",
) -> None:
    """Raises unless a tensor is what another argument asks for.

    Args:
        name: of the tensor.
        tensor: the tensor.
        dtype: that it must have.
        shape: that it must have.
        x: the argument on whose device it must lie.
        owner: that argument's name.

    Raises:
        DtypeError, ShapeError, DeviceError: it is another.
    """
    if tensor.dtype is not dtype:
        raise DtypeError(name, str(dtype).removeprefix("torch."), tensor.dtype)
    if tensor.shape != shape:
        raise ShapeError(name, f"shape {list(shape)}", list(tensor.shape))
    if not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device:
        raise DeviceError(name, f"{owner}'s device {x.device}", tensor.device)


def check_lengths(lengths: torch.Tensor | None, x: torch.Tensor, owner: str = "x") -> None:
    """Raises unless lengths is None or int64 [B] on x's device; kernels check the values."""
    if lengths is not None:
        check_like("lengths", lengths, torch.int64, x.shape[:1], x, owner)


def check_length_values(lengths: torch.Tensor | None, longest: int) -> None:
    """Raises ArgumentError if a length lies outside 0..``longest``."""
    if lengths is not None:
        outside = ((lengths < 0) | (lengths > longest)).nonzero()
        if len(outside):
            raise length_error(lengths, int(outside[0]), longest)


def length_error(lengths: torch.Tensor | None, position: int, longest: int) -> ArgumentError:
    """The error for the length at ``position``."""
    got = None if lengths is None else int(lengths[position])
    return ArgumentError("lengths", f"values in [0, {longest}]", got)


def check_starts(cu_seqlens: torch.Tensor, x: torch.Tensor, owner: str = "x") -> None:
    """Raises unless cu_seqlens is int64 or int32 [B + 1] on x's device; values are not read."""
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise DtypeError("cu_seqlens", "int64 or int32", cu_seqlens.dtype)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ShapeError("cu_seqlens", "shape [B + 1]", list(cu_seqlens.shape))
    if cu_seqlens.device != x.device:
        raise DeviceError("cu_seqlens", f"{owner}'s device {x.device}", cu_seqlens.device)


def check_start_values(cu_seqlens: torch.Tensor, total: int) -> None:
    """Raises ArgumentError unless cu_seqlens rises from 0 to ``total``."""
    starts, before = cu_seqlens.tolist(), 0
    for position, start in enumerate(starts):
        last = position == len(starts) - 1
        if not before <= start <= (total if position else 0) or (last and start != total):
            raise start_error(cu_seqlens, position, total)
        before = start


def start_error(cu_seqlens: torch.Tensor, position: int, total: int) -> ArgumentError:
    """The error for the entry of cu_seqlens at ``position``."""
    got = f"{int(cu_seqlens[position])} at {position}"
    return ArgumentError("cu_seqlens", f"values rising from 0 to T = {total}", got)

"""Checks that the float and the INT8 form share."""

from __future__ import annotations

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError

# Taps of one channel at most, as in separable_projection.h.
MAX_WIDTH = 31


def check_width(depthwise: torch.Tensor, channels: int, causal: bool) -> None:
    """Raises unless depthwise is [C, W] with a width that can be centred (or is causal)."""
    if depthwise.dim() != 2 or depthwise.shape[0] != channels:
        raise ShapeError("depthwise", f"shape [{channels}, W]", list(depthwise.shape))
    width = depthwise.shape[1]
    if not 0 < width <= MAX_WIDTH or (width % 2 == 0 and not causal):
        expected = f"1 <= W <= {MAX_WIDTH}" + ("" if causal else ", odd")
        raise ShapeError("depthwise", expected, f"W = {width}")


def check_lengths(lengths: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raises unless lengths is int64 [B] on x's device; its values are checked by the kernel."""
    if lengths is None:
        return
    if lengths.dtype is not torch.int64:
        raise DtypeError("lengths", "int64", lengths.dtype)
    if lengths.dim() != 1 or lengths.shape[0] != x.shape[0]:
        raise ShapeError("lengths", f"shape [{x.shape[0]}]", list(lengths.shape))
    if lengths.device != x.device:
        raise DeviceError("lengths", f"x's device {x.device}", lengths.device)


def length_error(lengths: torch.Tensor | None, position: int, length: int) -> ArgumentError:
    got = None if lengths is None else int(lengths[position])
    return ArgumentError("lengths", f"values in [0, {length}]", got)


def check_values(lengths: torch.Tensor | None, length: int) -> None:
    """Raises if a length lies outside 0..L."""
    if lengths is not None:
        outside = ((lengths < 0) | (lengths > length)).nonzero()
        if len(outside):
            raise length_error(lengths, int(outside[0]), length)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """x, copied where its channels are not contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()

"""Torch's attention masks as what the kernel takes: lengths, where they are padding at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrec.errors import DeviceError, DtypeError, ShapeError
from fastrec.kernels._checks import check_length_values, check_lengths


def bias_of_mask(name: str, mask: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A mask as floats to add to the scores.

    Args:
        name: of the mask.
        mask: bool (True: not seen) or float.
        shape: that it must have.
        x: on whose device it must lie.

    Raises:
        ShapeError, DtypeError, DeviceError: it is not one for x.
    """
    if mask.shape != shape:
        raise ShapeError(name, f"shape {list(shape)}", list(mask.shape))
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise DtypeError(name, "bool or a floating-point dtype", mask.dtype)
    if mask.device != x.device:
        raise DeviceError(name, f"query's device {x.device}", mask.device)
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)


def lengths_of_mask(bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(lengths, None) where the bias [B, L] is padding at the end, else (None, bias).

    A graph cannot branch on values: there it must be padding at the end, and is checked to be when
    it runs.
    """
    seen = bias == 0
    lengths = seen.sum(1)
    positions = torch.arange(bias.shape[1], device=bias.device)
    padding = torch.where(positions < lengths[:, None], 0.0, -torch.inf)
    suffix = (bias == padding).all()
    if torch.compiler.is_compiling():
        torch._assert_async(
            suffix, "key_padding_mask: expected padding at the end in a compiled graph, got others"
        )
        return lengths, None
    return (lengths, None) if bool(suffix) else (None, bias)


def bias_of_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    """The bias [B, L] that hides the keys of x [B, L, d] from ``lengths`` on.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: lengths is not int64 [B], 0 to L.
    """
    check_lengths(lengths, x)
    if not torch.compiler.is_compiling():
        check_length_values(lengths, x.shape[1])
    positions = torch.arange(x.shape[1], device=x.device)
    return torch.where(positions < lengths[:, None], 0.0, -torch.inf)

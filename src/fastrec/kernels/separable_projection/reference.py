"""The definition of ``separable_projection`` and of its gradients in pure torch."""

from __future__ import annotations

import torch

from fastrec.kernels.grouped_linear.reference import (
    grouped_linear_backward_reference,
    grouped_linear_reference,
)


def taps_before(width: int, causal: bool) -> int:
    """How many of the taps look back."""
    return width - 1 if causal else width // 2


def valid_rows(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """x [B, L, C] with zeros beyond the lengths."""
    if lengths is None:
        return x
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(valid[..., None], x, torch.zeros_like(x))


def windows(x: torch.Tensor, width: int, before: int) -> torch.Tensor:
    """[B, L, C] -> [B, L, C, W]: the rows that each row's taps see, zeros outside."""
    if x.shape[1] == 0:
        return x.unsqueeze(-1).expand(*x.shape, width)
    rest = width - 1 - before
    return torch.nn.functional.pad(x, (0, 0, before, rest)).unfold(1, width, 1)


def separable_projection_reference(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Same arguments and result as :func:`fastrec.kernels.separable_projection`, in ``dtype``.

    ``dtype=None``: in the inputs' own, half-precision ones in float32; the result has x's dtype.
    """
    dtype = dtype or (torch.float32 if x.dtype.itemsize < 4 else x.dtype)
    width = depthwise.shape[1]
    seen = windows(valid_rows(x.to(dtype), lengths), width, taps_before(width, causal))
    h = torch.einsum("blcw,cw->blc", seen, depthwise.to(dtype))
    offset = None if bias is None else bias.to(dtype)
    y = grouped_linear_reference(h, pointwise.to(dtype), offset)
    return valid_rows(y, lengths).to(x.dtype)


def separable_projection_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients in closed form: dx, ddepthwise, dpointwise, dbias.

    Args:
        dy: gradient of the result.
        x, depthwise, pointwise, lengths, causal: as in the op.
        dtype: to compute in; None: x's, float32 for 16 bits.
    """
    dtype = dtype or (torch.float32 if x.dtype.itemsize < 4 else x.dtype)
    width = depthwise.shape[1]
    before = taps_before(width, causal)
    seen = windows(valid_rows(x.to(dtype), lengths), width, before)
    taps = depthwise.to(dtype)
    h = torch.einsum("blcw,cw->blc", seen, taps)
    dy = valid_rows(dy.to(dtype), lengths)
    dh, dpointwise, dbias = grouped_linear_backward_reference(dy, h, pointwise.to(dtype))
    ddepthwise = torch.einsum("blc,blcw->cw", dh, seen)
    back = windows(dh, width, width - 1 - before)
    dx = valid_rows(torch.einsum("blcw,cw->blc", back, taps.flip(1)), lengths)
    grads = (dx, ddepthwise, dpointwise, dbias)
    return tuple(grad.to(x.dtype) for grad in grads)

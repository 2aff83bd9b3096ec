"""Tensors as the compiled attention kernels take them: an address and strides."""

from __future__ import annotations

import torch


def row_view(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Address and strides of [B, H, L, D] or jagged [T, H, D].

    Args:
        x: any strides; copied where the dimensions of a row do not follow each other.

    Returns:
        The tensor, to be held until the kernel is done, and its address and strides of batch (0
        where jagged), head and row, in elements.
    """
    strides = x.stride()
    if strides[-1] != 1 and x.shape[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    if len(strides) == 4:
        batch, head, row, _ = strides
        return x, (x.data_ptr(), batch, head, row)
    row, head, _ = strides
    return x, (x.data_ptr(), 0, head, row)

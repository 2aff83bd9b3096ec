"""The definition of ``grouped_linear`` and of its gradients in pure torch."""

from __future__ import annotations

import torch


def _shuffled(y: torch.Tensor) -> torch.Tensor:
    """[M, G, O] -> [M, O * G]: output o of group g at position o * G + g."""
    rows, groups, outputs = y.shape
    return y.transpose(1, 2).reshape(rows, groups * outputs)


def grouped_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    shuffle: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Same arguments and result as :func:`fastrec.kernels.grouped_linear`, computed in ``dtype``.

    ``dtype=None``: in the inputs' own, half-precision ones in float32; the result has x's dtype.
    """
    dtype = dtype or (torch.float32 if x.dtype.itemsize < 4 else x.dtype)
    groups, outputs, inputs = weight.shape
    by_group = x.reshape(x.shape[:-1].numel(), groups, inputs).to(dtype)
    y = torch.einsum("mgi,goi->mgo", by_group, weight.to(dtype))
    if bias is not None:
        y = y + bias.to(dtype).view(groups, outputs)
    y = _shuffled(y) if shuffle else y.reshape(len(y), groups * outputs)
    return y.to(x.dtype).view(*x.shape[:-1], groups * outputs)


def grouped_linear_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    shuffle: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients in closed form.

    Args:
        dy: gradient of the result.
        x, weight, shuffle: as in :func:`fastrec.kernels.grouped_linear`.
        dtype: to compute in, as in :func:`grouped_linear_reference`.

    Returns:
        dx, dweight and dbias, in x's dtype.
    """
    dtype = dtype or (torch.float32 if x.dtype.itemsize < 4 else x.dtype)
    groups, outputs, inputs = weight.shape
    by_group = x.reshape(x.shape[:-1].numel(), groups, inputs).to(dtype)
    rows = len(by_group)
    if shuffle:
        dy = dy.reshape(rows, outputs, groups).transpose(1, 2)
    dy = dy.reshape(rows, groups, outputs).to(dtype)
    dx = torch.einsum("mgo,goi->mgi", dy, weight.to(dtype)).reshape(x.shape)
    dweight = torch.einsum("mgo,mgi->goi", dy, by_group)
    return dx.to(x.dtype), dweight.to(x.dtype), dy.sum(0).reshape(-1).to(x.dtype)

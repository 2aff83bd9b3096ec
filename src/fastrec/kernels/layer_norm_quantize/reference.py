"""The definition of ``layer_norm_quantize`` in pure torch."""

from __future__ import annotations

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels.sparse_int8_linear.reference import quantise

ACCUMULATORS, LANES = 4, 16


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, [rows, D] -> [rows, 1], in the order of every kernel.

    Element i belongs to accumulator i / 16 % 4, lane i % 16; each adds its elements in order;
    accumulators add as (0 + 1) + (2 + 3), lanes as i + (i + 8), then 4, 2, 1.
    """
    step = ACCUMULATORS * LANES
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % step))
    acc = x.new_zeros(x.shape[0], ACCUMULATORS, LANES)
    for part in x.unflatten(1, (x.shape[1] // step, ACCUMULATORS, LANES)).unbind(1):
        acc = acc + part
    lanes = (acc[:, 0] + acc[:, 1]) + (acc[:, 2] + acc[:, 3])
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half:]
        half //= 2
    return lanes


def layer_norm_quantize_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    return_sum: bool = False,
    sum_out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Arguments, results and errors of :func:`fastrec.kernels.layer_norm_quantize`, bit for bit."""
    total = x if residual is None else x + residual
    dims = x.shape[-1]
    rows = total.reshape(-1, dims)
    off = rows - ordered_sum(rows) / dims
    variance = ordered_sum(off * off) / dims
    # MKL's fp32 root is not correctly rounded; its fp64 root, rounded to fp32, is.
    y = off * (1 / torch.sqrt((variance + eps).double()).to(x.dtype))
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    y = y.reshape(x.shape)
    if out_scale is not None:
        if bool(y.isnan().any()):
            raise ArgumentError("x", "rows whose norm is a number", "a NaN or an infinity")
        y = quantise(y.float(), out_scale, out_zero_point)
    if not (return_sum or sum_out is not None):
        return y
    if sum_out is None:
        return y, total if residual is not None else x.clone()
    sum_out.copy_(total)
    return y, sum_out

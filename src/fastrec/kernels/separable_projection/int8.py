"""The INT8 form: u8 activations, s8 taps, requantised to u8, then ``sparse_int8_linear``."""

from __future__ import annotations

import torch

from fastrec.errors import DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._compiled import Signature, cpu_can_run
from fastrec.kernels._registry import Backends, always
from fastrec.kernels.separable_projection.reference import taps_before, valid_rows, windows
from fastrec.kernels.separable_projection.shapes import (
    check_lengths,
    check_values,
    check_width,
    length_error,
)
from fastrec.kernels.sparse_int8_linear import (
    PackedWeight,
    check_quantisation,
    sparse_int8_linear,
)
from fastrec.kernels.sparse_int8_linear.packed import check_vector
from fastrec.kernels.sparse_int8_linear.reference import quantise

BACKENDS = Backends("separable_projection_int8", {"cpu": cpu_can_run, "reference": always})


def depthwise_int8_reference(
    x_u8: torch.Tensor,
    depthwise_s8: torch.Tensor,
    scale: torch.Tensor,
    *,
    x_zero_point: int,
    hidden_scale: float,
    hidden_zero_point: int,
    lengths: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """u8 [B, L, C]: the exact sums, times ``scale`` [C] (of input and taps), requantised."""
    width = depthwise_s8.shape[1]
    shifted = valid_rows(x_u8.double() - x_zero_point, lengths)
    seen = windows(shifted, width, taps_before(width, causal))
    sums = torch.einsum("blcw,cw->blc", seen, depthwise_s8.double()).float()
    hidden = quantise(sums * scale, hidden_scale, hidden_zero_point)
    beyond = torch.full_like(hidden, hidden_zero_point)
    valid = valid_rows(torch.ones_like(hidden), lengths) != 0
    return torch.where(valid, hidden, beyond)


def separable_projection_int8(
    x_u8: torch.Tensor,
    depthwise_s8: torch.Tensor,
    depthwise_scale: torch.Tensor,
    packed: PackedWeight,
    *,
    x_scale: float,
    x_zero_point: int,
    hidden_scale: float,
    hidden_zero_point: int,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Separable projection in 8-bit integers; every backend gives the same bits.

    Args:
        x_u8: uint8 [B, L, C]; real input = (x_u8 - x_zero_point) * x_scale.
        depthwise_s8: int8 [C, W], W odd and at most 31 (even too where causal).
        depthwise_scale: float32 [C]; real tap = s8 tap * scale.
        packed: the pointwise weight, C inputs; ``pack_grouped_int8`` makes a grouped one.
        hidden_scale, hidden_zero_point: quantisation of the convolution's result, uint8.
        bias, activation, out, out_scale, out_zero_point: of the projection, as in
            ``sparse_int8_linear``.
        lengths, causal: as in ``separable_projection``.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        float32 or uint8 [B, L, N]; beyond the lengths 0, or out_zero_point. Not differentiable.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    if x_u8.dtype is not torch.uint8:
        raise DtypeError("x_u8", "uint8", x_u8.dtype)
    if x_u8.dim() != 3 or x_u8.shape[2] != packed.inputs:
        raise ShapeError("x_u8", f"shape [B, L, {packed.inputs}]", list(x_u8.shape))
    if depthwise_s8.dtype is not torch.int8:
        raise DtypeError("depthwise_s8", "int8", depthwise_s8.dtype)
    batch, length, channels = x_u8.shape
    check_width(depthwise_s8, channels, causal)
    check_vector("depthwise_scale", depthwise_scale, channels)
    for name, tensor in (("depthwise_s8", depthwise_s8), ("depthwise_scale", depthwise_scale)):
        if tensor.device != x_u8.device:
            raise DeviceError(name, f"x_u8's device {x_u8.device}", tensor.device)
    check_lengths(lengths, x_u8)
    check_quantisation("x", x_scale, x_zero_point)
    check_quantisation("hidden", hidden_scale, hidden_zero_point)
    # Rounded to float32 in this order everywhere.
    scale = depthwise_scale.contiguous() * torch.tensor(x_scale, dtype=torch.float32)
    if BACKENDS.choose(Signature(x_u8.device.type), backend) == "reference":
        check_values(lengths, length)
        hidden = depthwise_int8_reference(
            x_u8,
            depthwise_s8,
            scale,
            x_zero_point=x_zero_point,
            hidden_scale=hidden_scale,
            hidden_zero_point=hidden_zero_point,
            lengths=lengths,
            causal=causal,
        )
    else:
        x_u8, depthwise_s8 = x_u8.contiguous(), depthwise_s8.contiguous()
        lengths = None if lengths is None else lengths.contiguous()
        hidden = torch.empty_like(x_u8)
        width = depthwise_s8.shape[1]
        inverse = torch.tensor(1.0) / torch.tensor(hidden_scale, dtype=torch.float32)
        bad = _compiled.native().separable_projection.depthwise_u8(
            x_u8.data_ptr(),
            x_zero_point,
            depthwise_s8.data_ptr(),
            scale.data_ptr(),
            inverse.item(),
            hidden_zero_point,
            hidden.data_ptr(),
            0 if lengths is None else lengths.data_ptr(),
            batch,
            length,
            channels,
            width,
            taps_before(width, causal),
        )
        if bad >= 0:
            raise length_error(lengths, bad, length)
    y = sparse_int8_linear(
        hidden,
        packed,
        x_scale=hidden_scale,
        x_zero_point=hidden_zero_point,
        bias=bias,
        activation=activation,
        out=out,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        backend=backend,
    )
    if lengths is not None:
        beyond = torch.arange(length) >= lengths[:, None]
        y.masked_fill_(beyond[..., None], out_zero_point or 0)
    return y

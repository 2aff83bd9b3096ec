"""``sparse_int8_linear``: u8 activations x block-sparse s8 weights with a fused epilogue.

    y[m, n] = act(x_scale * w_scale[n] * sum_k (x[m, k] - z) * w[n, k] + bias[n])

The weight keeps only its non-zero groups of 32 outputs x 4 inputs (:class:`PackedWeight`); a dense
weight is the same format with every group kept. Accumulators are exact int32. Source: the paper's
"quantisation of the non-zero weights", s = (max - min) / (2^b - 1), with b = 8.
"""

from __future__ import annotations

import math

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels._compiled import cpu_can_run
from fastrec.kernels._registry import Backends, OpSpec, Signature, always
from fastrec.kernels.sparse_int8_linear import _cpu
from fastrec.kernels.sparse_int8_linear.packed import PackedWeight, check_vector
from fastrec.kernels.sparse_int8_linear.reference import sparse_int8_linear_reference

__all__ = ["SPEC", "PackedWeight", "sparse_int8_linear"]


# `reference` is the definition and the last fallback.
BACKENDS = Backends("sparse_int8_linear", {"cpu": cpu_can_run, "reference": always})


def check_quantisation(prefix: str, scale: float, zero_point: int) -> None:
    """Raises ArgumentError unless scale is finite and > 0 and zero_point lies in 0..255."""
    if not (math.isfinite(scale) and scale > 0):
        raise ArgumentError(f"{prefix}_scale", "a finite number > 0", scale)
    if not 0 <= zero_point <= 255:
        raise ArgumentError(f"{prefix}_zero_point", "an integer in 0..255", zero_point)


def check_epilogue(
    outputs: int,
    bias: torch.Tensor | None,
    activation: str | None,
    out_scale: float | None,
    out_zero_point: int | None,
) -> None:
    """Checks all that does not depend on the input."""
    if bias is not None:
        check_vector("bias", bias, outputs)
        if not bool(torch.isfinite(bias).all()):
            raise ArgumentError("bias", "finite values", "a NaN or an infinity")
    if activation not in _cpu.ACTIVATION_CODES:
        raise ArgumentError("activation", "None, 'relu' or 'gelu'", activation)
    if out_scale is not None:
        if out_zero_point is None:
            raise ArgumentError("out_zero_point", "an integer in 0..255 beside out_scale", None)
        check_quantisation("out", out_scale, out_zero_point)


def check_input(x: torch.Tensor, inputs: int) -> None:
    """Raises unless x is float32 or uint8 [..., K]."""
    if x.dtype is not torch.uint8 and x.dtype is not torch.float32:
        raise DtypeError("x", "uint8 or float32", x.dtype)
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ShapeError("x", f"shape [..., {inputs}]", list(x.shape))


def sparse_int8_linear(
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
    backend: str | None = None,
) -> torch.Tensor:
    """Quantised linear layer over a packed, possibly sparse, s8 weight.

    Args:
        x_u8: uint8 [..., K]; or float32 [..., K], which the kernel quantises on the way in.
        packed: the weight, N outputs x K inputs.
        x_scale, x_zero_point: real input = (x_u8 - x_zero_point) * x_scale.
        bias: float32 [N], added before the activation.
        activation: None, "relu" or "gelu" (the erf form, to 4.3e-7 of erf).
        out: None for float32, "uint8" to requantise with out_scale and out_zero_point.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        float32 or uint8 [..., N]. Not differentiable: train through
        ``fastrec.quantize_(model, QAT(step="prepare"))``.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument, a NaN in a float input.
        BackendError: the backend asked for can't run.
    """
    if out not in (None, "uint8"):
        raise ArgumentError("out", "None or 'uint8'", out)
    if (out == "uint8") != (out_scale is not None):
        raise ArgumentError("out_scale", "a number exactly where out='uint8'", out_scale)
    check_quantisation("x", x_scale, x_zero_point)
    check_epilogue(packed.outputs, bias, activation, out_scale, out_zero_point)
    check_input(x_u8, packed.inputs)
    if x_u8.device != packed.values.device:
        raise DeviceError("x_u8", f"the weight's device {packed.values.device}", x_u8.device)
    name = BACKENDS.choose(Signature(x_u8.device.type), backend)
    if name == "reference":
        if x_u8.dtype is torch.float32 and bool(x_u8.isnan().any()):
            raise ArgumentError("x", "numbers", "a NaN")
        return sparse_int8_linear_reference(
            x_u8,
            packed,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            bias=bias,
            activation=activation,
            out=out,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
        )
    bias = None if bias is None else bias.contiguous()
    prepared = _cpu.prepare(
        packed,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        bias=bias,
        activation=activation,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
    )
    result = torch.empty(
        (*x_u8.shape[:-1], packed.outputs), dtype=torch.uint8 if out else torch.float32
    )
    _cpu.run(prepared, x_u8.contiguous(), result, packed.inputs)
    return result


# The torch op, which torch.compile and torch.export see. Eager callers bypass it (SparseInt8Linear
# calls a prepared handle), because the dispatcher costs more than a small layer. The scales are 0-d
# tensors, because a traced module holds buffers, not numbers.
_LIBRARY = torch.library.Library("fastrec", "FRAGMENT")
_LIBRARY.define(
    "sparse_int8_linear(Tensor x, Tensor values, Tensor group_index, Tensor panel_start, "
    "Tensor w_scale, Tensor? bias, Tensor x_scale, Tensor x_zero_point, str? activation, "
    "Tensor? out_scale, Tensor? out_zero_point) -> Tensor"
)


def _op(
    x: torch.Tensor,
    values: torch.Tensor,
    group_index: torch.Tensor,
    panel_start: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    activation: str | None,
    out_scale: torch.Tensor | None,
    out_zero_point: torch.Tensor | None,
) -> torch.Tensor:
    packed = PackedWeight.from_parts(
        values, group_index, panel_start, w_scale, len(w_scale), x.shape[-1]
    )
    return sparse_int8_linear(
        x,
        packed,
        x_scale=x_scale.item(),
        x_zero_point=int(x_zero_point),
        bias=bias,
        activation=activation,
        out=None if out_scale is None else "uint8",
        out_scale=None if out_scale is None else out_scale.item(),
        out_zero_point=None if out_zero_point is None else int(out_zero_point),
    )


def _op_fake(
    x: torch.Tensor,
    values: torch.Tensor,
    group_index: torch.Tensor,
    panel_start: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    activation: str | None,
    out_scale: torch.Tensor | None,
    out_zero_point: torch.Tensor | None,
) -> torch.Tensor:
    dtype = torch.float32 if out_scale is None else torch.uint8
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=dtype)


_LIBRARY.impl("sparse_int8_linear", _op, "CPU")
torch.library.register_fake("fastrec::sparse_int8_linear", _op_fake, lib=_LIBRARY)


def _spec() -> OpSpec:
    from fastrec.kernels.sparse_int8_linear import samples

    return OpSpec(
        op_id="sparse_int8_linear",
        summary="u8 activations x block-sparse s8 weights, fused bias, activation and requantise",
        function=sparse_int8_linear,
        reference=sparse_int8_linear_reference,
        backends=BACKENDS,
        samples=samples.samples,
        compare=samples.compare,
    )


SPEC = _spec()

"""``activation_quantize``: an activation and the quantisation after it, in one pass.

    y = quantise(act(x)),  or  y = quantise(act(float(acc) * scale[c] + bias[c])) of int32 sums

GELU is the exact one (Hendrycks & Gimpel, arXiv:1606.08415), its erf within 4.3e-7.
"""

from __future__ import annotations

from typing import Any

import torch

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import check_like, check_output_quantisation
from fastrec.kernels._compiled import Signature, cpu_takes
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels._torch_op import define_op
from fastrec.kernels.activation_quantize.reference import activation_quantize_reference
from fastrec.kernels.activation_quantize.samples import compare, samples

__all__ = ["SPEC", "activation_quantize"]


BACKENDS = Backends(
    "activation_quantize",
    {"cpu": cpu_takes("float32", "bfloat16", "int32"), "reference": always},
)

# The orders of the enums in activation_quantize.h.
INPUT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2}
OUTPUTS = {"uint8": (0, torch.uint8), "bfloat16": (1, torch.bfloat16), None: (2, torch.float32)}


def _check(
    x: torch.Tensor,
    activation: str | None = None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> None:
    if x.dtype not in INPUT_CODES and x.dtype is not torch.float64:
        raise DtypeError("x", "float32, bfloat16 or int32 (float64 on the reference)", x.dtype)
    if activation not in ACTIVATION_CODES:
        raise ArgumentError("activation", "None, 'relu' or 'gelu'", activation)
    if out not in OUTPUTS:
        raise ArgumentError("out", "None, 'uint8' or 'bfloat16'", out)
    if (out == "uint8") != (out_scale is not None):
        raise ArgumentError("out_scale", "a number exactly where out='uint8'", out_scale)
    if out_scale is not None:
        check_output_quantisation(out_scale, out_zero_point)
    if x.dtype is not torch.int32:
        for name, tensor in (("scale", scale), ("bias", bias)):
            if tensor is not None:
                raise ArgumentError(name, "None unless x is int32", f"a tensor, x is {x.dtype}")
        return
    shape = x.shape[-1:]
    if not shape or shape[0] == 0:
        raise ShapeError("x", "shape [..., C], C > 0", list(x.shape))
    if scale is None:
        raise ArgumentError("scale", "a float32 tensor [C] with an int32 x", None)
    check_like("scale", scale, torch.float32, shape, x)
    if bias is not None:
        check_like("bias", bias, torch.float32, shape, x)


def activation_quantize(
    x: torch.Tensor,
    activation: str | None = None,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Activation and (re)quantisation.

    Args:
        x: float32 or bfloat16 of any shape, or int32 accumulators [..., C]; float64 runs on the
            reference.
        activation: None, "relu" or "gelu" (by erf).
        scale, bias: float32 [C] with an int32 x (bias may be None), else None.
        out: None for float32 (float64 of a float64 x), "bfloat16", or "uint8" with ``out_scale``
            and ``out_zero_point``: clip(round(y / scale) + zero point).
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        x's shape; the same bits on every CPU and with any number of threads. Float outputs are
        differentiable by a float x.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument; a NaN that would have
            to become a uint8.
        BackendError: the backend asked for can't run.
    """
    _check(x, activation, scale, bias, out, out_scale, out_zero_point)
    if backend is None and (
        torch.compiler.is_compiling()
        or type(x) is not torch.Tensor
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        return torch.ops.fastrec.activation_quantize(
            x, activation, scale, bias, out, out_scale, out_zero_point
        )
    return _run(x, activation, scale, bias, out, out_scale, out_zero_point, backend)


def _run(
    x: torch.Tensor,
    activation: str | None = None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    dtype = x.dtype
    decided = backend is None and x.is_cpu and dtype is not torch.float64
    if not (decided and BACKENDS.cpu_is_compiled) and (
        BACKENDS.choose(Signature(x.device.type, str(dtype)), backend) == "reference"
    ):
        return activation_quantize_reference(
            x,
            activation,
            scale=scale,
            bias=bias,
            out=out,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
        )
    x = x.contiguous()
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    code, out_dtype = OUTPUTS[out]
    y = torch.empty(x.shape, dtype=out_dtype)
    numbers = _compiled.native().activation_quantize.run(
        x.data_ptr(),
        INPUT_CODES[dtype],
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        ACTIVATION_CODES[activation],
        y.data_ptr(),
        code,
        1.0 if out_scale is None else out_scale,
        out_zero_point,
        x.numel(),
        1 if scale is None else x.shape[-1],
    )
    if not numbers:
        raise ArgumentError("x", "numbers", "a NaN")
    return y


def _op(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check(x, *rest)
    with torch.no_grad():
        y = _run(x, *rest)
    return y.clone() if y is x else y


def _fake(
    x: torch.Tensor,
    activation: str | None = None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: str | None = None,
    *rest: Any,
) -> torch.Tensor:
    dtype = x.dtype if out is None and x.dtype is torch.float64 else OUTPUTS[out][1]
    return x.new_empty(x.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.activation = inputs[1]


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    (x,) = ctx.saved_tensors
    if not x.is_floating_point():
        return (None,) * 7
    # In the wider of the two types: a bfloat16 x with a float32 output, or the other way round.
    wide = torch.promote_types(x.dtype, grad.dtype)
    grad, value = grad.to(wide), x.to(wide)
    if ctx.activation == "relu":
        grad = grad * (value > 0)
    elif ctx.activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, value)
    return grad.to(x.dtype), None, None, None, None, None, None


define_op(
    "activation_quantize(Tensor x, str? activation=None, Tensor? scale=None, Tensor? bias=None, "
    "str? out=None, float? out_scale=None, int out_zero_point=0) -> Tensor",
    _op,
    _fake,
    backward=_backward,
    save=_save,
    devices=("CPU",),
)

SPEC = OpSpec(
    op_id="activation_quantize",
    summary="ReLU or GELU of floats or int32 sums, as uint8, bfloat16 or float32, in one pass",
    function=activation_quantize,
    reference=activation_quantize_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

"""``layer_norm_quantize``: residual, LayerNorm and quantisation in one pass over a row.

    s = x + residual;  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, as uint8 or float32

LayerNorm as in Ba, Kiros & Hinton, arXiv:1607.06450. A pre-norm block writes s and reads y, which
an INT8 layer takes as uint8: fused, the row is read from memory once.
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
from fastrec.kernels.layer_norm_quantize.reference import layer_norm_quantize_reference
from fastrec.kernels.layer_norm_quantize.samples import compare, samples

__all__ = ["SPEC", "layer_norm_quantize"]


BACKENDS = Backends("layer_norm_quantize", {"cpu": cpu_takes("float32"), "reference": always})


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    sum_out: torch.Tensor | None,
) -> None:
    dtype, shape = x.dtype, x.shape
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise DtypeError("x", "float32 (float64 on the reference)", dtype)
    if not shape or shape[-1] == 0:
        raise ShapeError("x", "shape [..., D], D > 0", list(shape))
    if weight is not None:
        check_like("weight", weight, dtype, shape[-1:], x)
    if bias is not None:
        check_like("bias", bias, dtype, shape[-1:], x)
    if residual is not None:
        check_like("residual", residual, dtype, shape, x)
    if not 0 <= eps <= 1e30:
        raise ArgumentError("eps", "a finite number >= 0", eps)
    if sum_out is not None:
        check_like("sum_out", sum_out, dtype, shape, x)
        if not sum_out.is_contiguous():
            raise ArgumentError("sum_out", "a contiguous tensor", f"strides {sum_out.stride()}")


def layer_norm_quantize(
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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension, of a sum, quantised: each where it is asked for.

    Args:
        x: float32 [..., D]; float64 runs on the reference.
        weight, bias: [D] of x's dtype, or None.
        residual: like x; added first.
        eps: added to the variance.
        out_scale: None for a float output; else y is uint8, clip(round(y / scale) + zero point).
        out_zero_point: 0..255, of a uint8 output.
        return_sum: also return x + residual, which a pre-norm block goes on with.
        sum_out: where that sum is written, contiguous; x or residual themselves for in place.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        y [..., D], or (y, sum) with ``return_sum`` or ``sum_out``. The same bits on every CPU and
        with any number of threads. A float y is differentiable, and so is the sum.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument; a row whose norm is not
            a number where y is to be uint8.
        BackendError: the backend asked for can't run.
    """
    _check(x, weight, bias, residual, eps, sum_out)
    if out_scale is not None:
        check_output_quantisation(out_scale, out_zero_point)
    with_sum = return_sum or sum_out is not None
    if backend is None and _needs_op(x, weight, bias, residual):
        y, total = torch.ops.fastrec.layer_norm_quantize(
            x,
            weight,
            bias,
            residual,
            eps,
            out_scale,
            out_zero_point,
            with_sum,
        )
        if sum_out is not None:
            total = sum_out.copy_(total)
        return (y, total) if with_sum else y
    return _compute(
        x, weight, bias, residual, eps, out_scale, out_zero_point, with_sum, sum_out, backend
    )


def _compute(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: float | None,
    out_zero_point: int,
    with_sum: bool,
    sum_out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    decided = backend is None and x.is_cpu and x.dtype is torch.float32 and BACKENDS.cpu_is_compiled
    if decided or BACKENDS.choose(Signature(x.device.type, str(x.dtype)), backend) == "cpu":
        if with_sum and sum_out is None:
            sum_out = torch.empty(x.shape)
        return _run(x, weight, bias, residual, eps, out_scale, out_zero_point, sum_out)
    return layer_norm_quantize_reference(
        x,
        weight,
        bias,
        residual=residual,
        eps=eps,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        return_sum=with_sum,
        sum_out=sum_out,
    )


def _needs_op(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the call must be one that autograd or a tracer can see."""
    if torch.compiler.is_compiling() or (type(x) is not torch.Tensor):
        return True
    return torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in others)
    )


def _run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    out_scale: float | None,
    out_zero_point: int,
    sum_out: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The compiled kernel on checked arguments."""
    shape = x.shape
    dims = shape[-1]
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    quantised = out_scale is not None
    # As x: torch takes a microsecond or two more to read a shape.
    y = torch.empty_like(x, dtype=torch.uint8) if quantised else torch.empty_like(x)
    numbers = _compiled.native().layer_norm_quantize.run(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if sum_out is None else sum_out.data_ptr(),
        y.data_ptr(),
        quantised,
        out_scale if quantised else 1.0,
        out_zero_point,
        eps,
        x.numel() // dims,
        dims,
    )
    if not numbers:
        raise ArgumentError("x", "rows whose norm is a number", "a NaN or an infinity")
    return y if sum_out is None else (y, sum_out)


def _op(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    return_sum: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, bias, residual, eps, None)
    with torch.no_grad():
        y = _compute(x, weight, bias, residual, eps, out_scale, out_zero_point, return_sum)
    return y if isinstance(y, tuple) else (y, x.new_empty(0))


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    return_sum: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape, dtype=x.dtype if out_scale is None else torch.uint8)
    return y, x.new_empty(x.shape if return_sum else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, residual, ctx.eps, out_scale, _, ctx.return_sum = inputs
    ctx.save_for_backward(x, residual, weight)
    ctx.has_bias, ctx.quantised = bias is not None, out_scale is not None


def _backward(ctx: Any, grad_y: torch.Tensor, grad_sum: torch.Tensor) -> Any:
    x, residual, weight = ctx.saved_tensors
    total = x if residual is None else x + residual
    grad = grad_sum if ctx.return_sum else None
    grad_weight = grad_bias = None
    if not ctx.quantised:
        off = total - total.mean(-1, keepdim=True)
        rstd = torch.rsqrt((off * off).mean(-1, keepdim=True) + ctx.eps)
        normed = off * rstd
        inner = grad_y if weight is None else grad_y * weight
        slope = (inner * normed).mean(-1, keepdim=True)
        through = rstd * (inner - inner.mean(-1, keepdim=True) - normed * slope)
        grad = through if grad is None else grad + through
        if weight is not None:
            grad_weight = (grad_y * normed).reshape(-1, x.shape[-1]).sum(0)
        if ctx.has_bias:
            grad_bias = grad_y.reshape(-1, x.shape[-1]).sum(0)
    grad_residual = None if residual is None else grad
    return grad, grad_weight, grad_bias, grad_residual, None, None, None, None


define_op(
    "layer_norm_quantize(Tensor x, Tensor? weight=None, Tensor? bias=None, "
    "Tensor? residual=None, float eps=1e-5, float? out_scale=None, int out_zero_point=0, "
    "bool return_sum=False) -> (Tensor, Tensor)",
    _op,
    _fake,
    backward=_backward,
    save=_save,
    devices=("CPU",),
)

SPEC = OpSpec(
    op_id="layer_norm_quantize",
    summary="LayerNorm of a sum, as uint8 or float32, in one pass",
    function=layer_norm_quantize,
    reference=layer_norm_quantize_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

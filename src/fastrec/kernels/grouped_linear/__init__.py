"""``grouped_linear``: a block-diagonal projection, each group of channels by its own matrix.

    y[..., g * O + o] = bias[g * O + o] + sum_i x[..., g * I + i] * weight[g, o, i]

With ``shuffle`` output o of group g lands at position o * G + g instead (ShuffleNet's channel
shuffle), so that the next grouped layer sees every group. Forward and backward run on our kernels:
G times fewer multiply-adds and weights than the dense layer. Source: the paper's grouped
projections; channel shuffle from Zhang et al., "ShuffleNet" (2018).
"""

from __future__ import annotations

from typing import Any

import torch

from fastrec.errors import DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._compiled import Signature, cpu_takes
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels._torch_op import FLOAT_NAMES, define_op, is_plain
from fastrec.kernels.dlpack import takes_arrays
from fastrec.kernels.grouped_linear.reference import (
    grouped_linear_backward_reference,
    grouped_linear_reference,
)
from fastrec.kernels.grouped_linear.samples import compare, samples

__all__ = ["SPEC", "grouped_linear"]

floats_can_run = cpu_takes("float32", "bfloat16")
BACKENDS = Backends(
    "grouped_linear", {"cpu": floats_can_run, "triton": triton_can_run, "reference": always}
)


def chosen(backends: Backends, x: torch.Tensor, backend: str | None) -> str:
    """The backend for x, of an op that takes :func:`floats_can_run`."""
    compiled = x.dtype is torch.float32 or x.dtype is torch.bfloat16
    if backend is None and compiled and x.device.type == "cpu" and backends.cpu_is_compiled:
        return "cpu"
    return backends.choose(Signature(x.device.type, FLOAT_NAMES[x.dtype]), backend)


def _usual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether :func:`_check` would pass and the compiled kernel can read all three as they lie.

    Checks are most of a small call: those of arguments as they mostly are come first, and a
    False only means that :func:`_forward` looks again.
    """
    dtype = x.dtype
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return False
    if weight.dtype is not dtype or not x.is_cpu or not weight.is_cpu or weight.dim() != 3:
        return False
    groups, outputs, inputs = weight.shape
    if not (x.is_contiguous() and weight.is_contiguous() and groups and outputs and inputs):
        return False
    shape = x.shape
    if not shape or shape[-1] != groups * inputs:
        return False
    return bias is None or (
        bias.dtype is dtype
        and bias.is_cpu
        and bias.is_contiguous()
        and bias.dim() == 1
        and bias.shape[0] == groups * outputs
    )


def check_projection(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises unless x, weight [G, O, I] and bias [G * O] agree but for x's shape."""
    if x.dtype not in FLOAT_NAMES:
        raise DtypeError("x", "a floating-point dtype", x.dtype)
    if weight.dim() != 3 or 0 in weight.shape:
        raise ShapeError("weight", "shape [G, O, I], all > 0", list(weight.shape))
    if weight.dtype is not x.dtype:
        raise DtypeError("weight", f"x's dtype {x.dtype}", weight.dtype)
    if weight.device != x.device:
        raise DeviceError("weight", f"x's device {x.device}", weight.device)
    if bias is not None:
        outputs = weight.shape[0] * weight.shape[1]
        if bias.dtype is not x.dtype:
            raise DtypeError("bias", f"x's dtype {x.dtype}", bias.dtype)
        if bias.dim() != 1 or bias.shape[0] != outputs:
            raise ShapeError("bias", f"shape [{outputs}]", list(bias.shape))
        if bias.device != x.device:
            raise DeviceError("bias", f"x's device {x.device}", bias.device)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_projection(x, weight, bias)
    inputs = weight.shape[0] * weight.shape[2]
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ShapeError("x", f"shape [..., {inputs}]", list(x.shape))


def rows(x: torch.Tensor) -> torch.Tensor:
    """x as [M, channels] whose channels are contiguous; a view where possible."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@takes_arrays
def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    shuffle: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Projects each group of channels by its own matrix.

    Args:
        x: [..., G * I], float32 or bfloat16 (other float dtypes run on the reference; float16 on
            a GPU too); read in place where one stride leads from row to row and channels are
            contiguous, else copied.
        weight: [G, O, I], x's dtype.
        bias: [G * O] in the order g * O + o, also where ``shuffle`` is set; x's dtype.
        shuffle: output o of group g at channel o * G + g instead of g * O + o.
        backend: None picks the best once per signature; "cpu", "triton" or "reference" forces one.

    Returns:
        [..., G * O], contiguous, x's dtype; sums are float32 (float64 for float64). Differentiable
        in x, weight and bias; gradients are the same bits for any number of threads.

    Raises:
        ShapeError, DtypeError, DeviceError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    if is_plain(x, weight, bias):
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _Eager.apply(x, weight, bias, shuffle, backend)
        return _forward(x, weight, bias, shuffle, backend)
    return torch.ops.fastrec.grouped_linear(x, weight, bias, shuffle, backend)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    shuffle: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    if backend is None and _usual(x, weight, bias) and BACKENDS.cpu_is_compiled:
        return _run(x, weight, bias, shuffle)
    _check(x, weight, bias)
    kind = chosen(BACKENDS, x, backend)
    if kind == "reference":
        return grouped_linear_reference(x, weight, bias, shuffle=shuffle)
    if kind == "triton":
        from fastrec.kernels.grouped_linear import _triton

        y = x.new_empty((*x.shape[:-1], weight.shape[0] * weight.shape[1]))
        bias = None if bias is None else bias.contiguous()
        _triton.forward(rows(x), weight.contiguous(), bias, y, shuffle)
        return y
    return _run(
        rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), shuffle, x.shape
    )


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shuffle: bool,
    shape: torch.Size | None = None,
) -> torch.Tensor:
    """The compiled kernel on checked arguments, all but the rows of a 2-D x contiguous; ``shape``
    is that of the caller's x."""
    groups, outputs, inputs = weight.shape
    shape = shape or x.shape
    channels = groups * inputs
    if len(shape) == 2:
        # Sizes one by one: torch takes half a microsecond more for a tuple.
        count = shape[0]
        y = x.new_empty(count, groups * outputs)
    else:
        y = x.new_empty((*shape[:-1], groups * outputs))
        count = x.numel() // channels
    _compiled.native().grouped_linear.forward(
        x.data_ptr(),
        x.stride(0) if x.dim() == 2 else channels,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.dtype is torch.bfloat16,
        shuffle,
        count,
        groups,
        outputs,
        inputs,
    )
    return y


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    shuffle: bool,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias), those not wanted empty."""
    groups, outputs, inputs = weight.shape
    kind = chosen(BACKENDS, x, backend)
    if kind == "reference":
        dx, dweight, dbias = grouped_linear_backward_reference(dy, x, weight, shuffle=shuffle)
        return (
            dx.contiguous() if wants_x else x.new_empty(0),
            dweight.contiguous() if wants_weight else x.new_empty(0),
            dbias if wants_bias else x.new_empty(0),
        )
    dy, flat, weight = rows(dy), rows(x), weight.contiguous()
    dx = x.new_empty(*x.shape) if wants_x else x.new_empty(0)
    # The bias' gradient comes with the weight's.
    sums = wants_weight or wants_bias
    dweight = torch.empty_like(weight) if sums else x.new_empty(0)
    dbias = x.new_empty(groups * outputs) if wants_bias else x.new_empty(0)
    if kind == "triton":
        from fastrec.kernels.grouped_linear import _triton

        if wants_x:
            _triton.backward_x(dy, weight, dx, shuffle)
        if sums:
            _triton.backward_weight(dy, flat, dweight, dbias if wants_bias else None, shuffle)
        return dx, dweight if wants_weight else x.new_empty(0), dbias
    _compiled.native().grouped_linear.backward(
        dy.data_ptr(),
        dy.stride(0),
        flat.data_ptr(),
        flat.stride(0),
        weight.data_ptr(),
        dx.data_ptr() if wants_x else 0,
        dweight.data_ptr() if sums else 0,
        dbias.data_ptr() if wants_bias else 0,
        x.dtype is torch.bfloat16,
        shuffle,
        flat.shape[0],
        groups,
        outputs,
        inputs,
        wants_x,
        sums,
    )
    return dx, dweight if wants_weight else x.new_empty(0), dbias


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *rest: Any
) -> torch.Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0] * weight.shape[1]))


def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    shuffle: bool,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = weight.shape[0] * weight.shape[1]
    return (
        x.new_empty(x.shape if wants_x else (0,)),
        x.new_empty(weight.shape if wants_weight else (0,)),
        x.new_empty((outputs,) if wants_bias else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, ctx.shuffle, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _derive(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    # Arguments left at their defaults have no entry.
    wants = (*ctx.needs_input_grad, False)[:3]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # A gradient that will be derived again: torch derives the reference.
        grads = grouped_linear_backward_reference(dy, x, weight, shuffle=ctx.shuffle)
    else:
        backward = _backward if is_plain(dy, x, weight) else _OPS.grouped_linear_backward
        grads = backward(dy, x, weight, ctx.shuffle, wants[0], wants[1], wants[2], ctx.backend)
    chosen = [grad if want else None for grad, want in zip(grads, wants, strict=True)]
    return (*chosen, None, None)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs more than a small call's products."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, shuffle, backend
    ):
        ctx.save_for_backward(x, weight)
        ctx.shuffle, ctx.backend = shuffle, backend
        return _forward(x, weight, bias, shuffle, backend)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _derive(ctx, dy)


_OPS = torch.ops.fastrec
define_op(
    "grouped_linear(Tensor x, Tensor weight, Tensor? bias=None, bool shuffle=False, "
    "str? backend=None) -> Tensor",
    _forward,
    _fake,
    backward=_derive,
    save=_save,
)
define_op(
    "grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, bool shuffle, bool wants_x, "
    "bool wants_weight, bool wants_bias, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


SPEC = OpSpec(
    op_id="grouped_linear",
    summary="block-diagonal projection, optional channel shuffle; forward and backward",
    function=grouped_linear,
    reference=grouped_linear_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

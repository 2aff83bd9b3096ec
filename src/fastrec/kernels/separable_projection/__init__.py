"""``separable_projection``: a depthwise convolution along the sequence, then a projection.

    h[b, l, c] = sum_j depthwise[c, j] * x[b, l + j - before, c]     (before = W // 2, causal W - 1)
    y[b, l] = grouped_linear(h[b, l], pointwise, bias)

One pass: a block of rows is convolved in L1 and meets the projection there; h is never written to
memory. Forward and backward run on our kernels. Source: the paper's separable projections; Chollet,
"Xception" (2017).
"""

from __future__ import annotations

from typing import Any

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import check_length_values, check_lengths, length_error
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels._torch_op import define_op, is_plain, wants_gradient
from fastrec.kernels.dlpack import takes_arrays
from fastrec.kernels.grouped_linear import check_projection, chosen, floats_can_run
from fastrec.kernels.separable_projection.reference import (
    separable_projection_backward_reference,
    separable_projection_reference,
    taps_before,
    valid_rows,
)
from fastrec.kernels.separable_projection.samples import compare, samples

__all__ = ["SPEC", "separable_projection"]

# Taps of one channel at most, as in separable_projection.h.
MAX_WIDTH = 31

BACKENDS = Backends(
    "separable_projection", {"cpu": floats_can_run, "triton": triton_can_run, "reference": always}
)


def _check(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None,
    lengths: torch.Tensor | None,
    causal: bool,
) -> None:
    try:
        check_projection(x, pointwise, bias)
    except ArgumentError as error:
        # There the weight is called weight.
        if error.argument != "weight":
            raise
        raise type(error)("pointwise", error.expected, error.got) from None
    if x.dim() != 3:
        raise ShapeError("x", "shape [B, L, C]", list(x.shape))
    channels = pointwise.shape[0] * pointwise.shape[2]
    if x.shape[2] != channels:
        raise ShapeError("x", f"shape [B, L, {channels}]", list(x.shape))
    if depthwise.dtype is not x.dtype:
        raise DtypeError("depthwise", f"x's dtype {x.dtype}", depthwise.dtype)
    if depthwise.device != x.device:
        raise DeviceError("depthwise", f"x's device {x.device}", depthwise.device)
    if depthwise.dim() != 2 or depthwise.shape[0] != channels:
        raise ShapeError("depthwise", f"shape [{channels}, W]", list(depthwise.shape))
    width = depthwise.shape[1]
    if not 0 < width <= MAX_WIDTH or (width % 2 == 0 and not causal):
        expected = f"1 <= W <= {MAX_WIDTH}" + ("" if causal else ", odd")
        raise ShapeError("depthwise", expected, f"W = {width}")
    check_lengths(lengths, x)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """x, copied where its channels are not contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


@takes_arrays
def separable_projection(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Depthwise convolution along the sequence ("same" zero padding), then a grouped projection.

    Args:
        x: [B, L, C], float32 or bfloat16 (other float dtypes run on the reference; float16 on a GPU
            too); any strides with contiguous channels are read in place.
        depthwise: [C, W], W odd and at most 31 (even too where causal), x's dtype; as in
            ``torch.nn.Conv1d`` the taps are not flipped.
        pointwise: [G, O, I], C = G * I, x's dtype; G = 1 is the plain projection.
        bias: [G * O], x's dtype.
        lengths: int64 [B], 0 to L: rows beyond count as zeros for the convolution, are never read,
            and their outputs are zero, without bias. None means L. A GPU's are not waited for: what
            is out of range is moved into it, and no error raised.
        causal: taps look at the row itself and the W - 1 before it, instead of W // 2 both ways.
        backend: None picks the best once per signature; "cpu", "triton" or "reference" forces one.

    Returns:
        [B, L, G * O], contiguous, x's dtype; the hidden rows and all sums are float32 (float64 for
        float64; hidden rows of 16 bits are rounded to them where a CPU or GPU multiplies them as
        they are, as they would be between two layers). Differentiable in x, depthwise, pointwise
        and bias; gradients are the same bits for any number of threads.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    tensors = (x, depthwise, pointwise, bias, lengths)
    if is_plain(*tensors) and not wants_gradient(*tensors):
        return _forward(x, depthwise, pointwise, bias, lengths, causal, backend)
    return torch.ops.fastrec.separable_projection(
        x, depthwise, pointwise, bias, lengths, causal, backend
    )


def _forward(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, depthwise, pointwise, bias, lengths, causal)
    kind = chosen(BACKENDS, x, backend)
    if kind == "reference":
        check_length_values(lengths, x.shape[1])
        return separable_projection_reference(
            x, depthwise, pointwise, bias, lengths=lengths, causal=causal
        )
    groups, outputs, _ = pointwise.shape
    batch, length, channels = x.shape
    width = depthwise.shape[1]
    x, depthwise, pointwise = _channels_last(x), depthwise.contiguous(), pointwise.contiguous()
    bias = None if bias is None else bias.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    y = x.new_empty((batch, length, groups * outputs))
    if kind == "triton":
        from fastrec.kernels.separable_projection import _triton

        if x.is_cpu:
            check_length_values(lengths, length)
        _triton.forward(x, depthwise, pointwise, bias, lengths, y, taps_before(width, causal))
        return y
    bad = _compiled.native().separable_projection.forward(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        depthwise.data_ptr(),
        pointwise.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.dtype is torch.bfloat16,
        0 if lengths is None else lengths.data_ptr(),
        batch,
        length,
        channels,
        width,
        taps_before(width, causal),
        groups,
        outputs,
    )
    if bad >= 0:
        raise length_error(lengths, bad, length)
    return y


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    lengths: torch.Tensor | None,
    causal: bool,
    wants: list[bool],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, ddepthwise, dpointwise, dbias), those not wanted empty. The forward checked lengths."""
    kind = chosen(BACKENDS, x, backend)
    if kind == "reference":
        grads = separable_projection_backward_reference(
            dy, x, depthwise, pointwise, lengths=lengths, causal=causal
        )
        return tuple(
            grad.contiguous() if want else x.new_empty(0)
            for grad, want in zip(grads, wants, strict=True)
        )
    groups, outputs, inputs = pointwise.shape
    batch, length, channels = x.shape
    width = depthwise.shape[1]
    dy = valid_rows(dy, lengths).contiguous()
    x, depthwise, pointwise = _channels_last(x), depthwise.contiguous(), pointwise.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    # The bias' gradient comes with the projection's.
    sums = wants[2] or wants[3]
    dx = x.new_empty((batch, length, channels) if wants[0] else 0)
    ddepthwise = x.new_empty((channels, width) if wants[1] else 0)
    dpointwise = x.new_empty((groups, outputs, inputs) if sums else 0)
    dbias = x.new_empty(groups * outputs if wants[3] else 0)
    if kind == "triton":
        from fastrec.kernels.separable_projection import _triton

        asked = zip((dx, ddepthwise, dpointwise, dbias), (*wants[:2], sums, wants[3]), strict=True)
        gradients = [gradient if want else None for gradient, want in asked]
        before = taps_before(width, causal)
        _triton.backward(dy, x, depthwise, pointwise, lengths, before, *gradients)
        return dx, ddepthwise, dpointwise if wants[2] else x.new_empty(0), dbias
    hidden = x.new_empty((batch, length, channels) if sums else 0, dtype=torch.float32)
    dhidden = x.new_empty(
        (batch, length, channels) if wants[0] or wants[1] else 0, dtype=torch.float32
    )
    _compiled.native().separable_projection.backward(
        dy.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        depthwise.data_ptr(),
        pointwise.data_ptr(),
        hidden.data_ptr(),
        dhidden.data_ptr(),
        dx.data_ptr() if wants[0] else 0,
        ddepthwise.data_ptr() if wants[1] else 0,
        dpointwise.data_ptr() if sums else 0,
        dbias.data_ptr() if wants[3] else 0,
        x.dtype is torch.bfloat16,
        0 if lengths is None else lengths.data_ptr(),
        batch,
        length,
        channels,
        width,
        taps_before(width, causal),
        groups,
        outputs,
    )
    return dx, ddepthwise, dpointwise if wants[2] else x.new_empty(0), dbias


def _fake(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    *rest: Any,
) -> torch.Tensor:
    _check(x, depthwise, pointwise, bias, lengths, causal)
    return x.new_empty((*x.shape[:-1], pointwise.shape[0] * pointwise.shape[1]))


def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    lengths: torch.Tensor | None,
    causal: bool,
    wants: list[bool],
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    shapes = (x.shape, depthwise.shape, pointwise.shape, (dy.shape[-1],))
    return tuple(
        x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wants, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, depthwise, pointwise, _, lengths, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(x, depthwise, pointwise, lengths)


def _derive(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, depthwise, pointwise, lengths = ctx.saved_tensors
    # Arguments left at their defaults have no entry.
    wants = [*ctx.needs_input_grad, False][:4]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # A gradient that will be derived again: torch derives the reference.
        grads = separable_projection_backward_reference(
            dy, x, depthwise, pointwise, lengths=lengths, causal=ctx.causal
        )
    else:
        grads = torch.ops.fastrec.separable_projection_backward(
            dy, x, depthwise, pointwise, lengths, ctx.causal, wants, ctx.backend
        )
    chosen = [grad if want else None for grad, want in zip(grads, wants, strict=True)]
    return (*chosen, None, None, None)


define_op(
    "separable_projection(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? bias=None, "
    "Tensor? lengths=None, bool causal=False, str? backend=None) -> Tensor",
    _forward,
    _fake,
    backward=_derive,
    save=_save,
)
define_op(
    "separable_projection_backward(Tensor dy, Tensor x, Tensor depthwise, Tensor pointwise, "
    "Tensor? lengths, bool causal, bool[] wants, str? backend=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


SPEC = OpSpec(
    op_id="separable_projection",
    summary="depthwise convolution along the sequence, then a grouped projection, in one pass",
    function=separable_projection,
    reference=separable_projection_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

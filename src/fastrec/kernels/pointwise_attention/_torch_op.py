"""``torch.ops.fastrec.pointwise_attention``: fake, autograd and its backward op."""

from __future__ import annotations

from typing import Any

import torch

from fastrec.kernels._compiled import Signature, cpu_takes
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Backends, always
from fastrec.kernels._torch_op import FLOAT_NAMES, define_op
from fastrec.kernels.pointwise_attention import _cpu, _reference_backward
from fastrec.kernels.pointwise_attention._cpu import Options
from fastrec.kernels.pointwise_attention.buckets import MAX_TIME
from fastrec.kernels.pointwise_attention.reference import pointwise_attention_reference

BACKENDS = Backends(
    "pointwise_attention",
    {
        "cpu": cpu_takes("float32", "bfloat16", "float16"),
        "triton": triton_can_run,
        "reference": always,
    },
)


def choose(q: torch.Tensor, backend: str | None) -> str:
    """The backend for this tensor."""
    return BACKENDS.choose(Signature(q.device.type, FLOAT_NAMES[q.dtype]), backend)


def check_values(q: torch.Tensor, o: Options) -> None:
    """The checks of values that the compiled kernel makes itself, for the reference."""
    length, sizes = q.shape[-2], None
    if o.cu_seqlens is not None:
        length = len(q)
        starts = o.cu_seqlens.tolist()
        for n, start in enumerate(starts):
            low, last = max(starts[n - 1], 0) if n else 0, n + 1 == len(starts)
            if not low <= start <= (length if n else 0) or (last and start != length):
                raise _cpu.bad_entry(2, n, q, o)
        sizes = o.cu_seqlens.diff()
    elif o.lengths is not None:
        outside = ((o.lengths < 0) | (o.lengths > length)).nonzero()
        if len(outside):
            raise _cpu.bad_entry(1, int(outside[0]), q, o)
        sizes = o.lengths
    if o.targets is not None:
        wrong = ((o.targets < 0) | (o.targets > (length if sizes is None else sizes))).nonzero()
        if len(wrong):
            raise _cpu.bad_entry(3, int(wrong[0]), q, o)
    if o.time_edges is not None and len(o.time_edges):
        before = torch.cat([o.time_edges.new_ones(1), o.time_edges[:-1]])
        wrong = ((o.time_edges < before) | (o.time_edges > MAX_TIME)).nonzero()
        if len(wrong):
            raise _cpu.bad_entry(4, int(wrong[0]), q, o)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> torch.Tensor:
    """The output, outside autograd."""
    o = Options(*options[:11])
    kind = choose(q, options[11] if len(options) > 11 else None)
    if kind == "cpu":
        return _cpu.forward(q, k, v, o)
    if kind == "reference" or q.is_cpu:
        check_values(q, o)
    if kind == "triton":
        from fastrec.kernels.pointwise_attention import _triton

        return _triton.forward(q, k, v, o)
    # float32 sums, whatever comes in.
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    with torch.no_grad():
        out = pointwise_attention_reference(q, k, v, **vars(o), dtype=dtype)
        return _cpu.empty_rows(q, v.shape[-1]).copy_(out)


def backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and those of the tables, empty where there is none."""
    o = Options(*options[:11])
    tables = (o.position_bias, o.time_bias)
    kind = choose(q, options[11] if len(options) > 11 else None)
    if kind == "reference":
        dq, dk, dv, *of_tables = _reference_backward.backward(d_out, q, k, v, **vars(o))
        grads = [_cpu.empty_rows(q, x.shape[-1]).copy_(x) for x in (dq, dk, dv)]
    else:
        if kind == "triton":
            from fastrec.kernels.pointwise_attention import _triton

            *grads, d_position, d_time = _triton.backward(d_out, q, k, v, o)
        else:
            *grads, d_position, d_time = _cpu.backward(d_out, q, k, v, o)
        of_tables = [
            None if x is None or table is None else (x if table.dim() == 2 else x.sum(0))
            for x, table in zip((d_position, d_time), tables, strict=True)
        ]
    return *grads, *(q.new_empty(0) if x is None else x for x in of_tables)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return _cpu.empty_rows(q, v.shape[-1])


def _fake_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> Any:
    tables = (q.new_empty(0) if x is None else torch.empty_like(x) for x in options[:2])
    return *(_cpu.empty_rows(q, x.shape[-1]) for x in (q, k, v)), *tables


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.rest = inputs[11:]
    ctx.eager = False


def _gradients(ctx: Any, d_out: torch.Tensor) -> Any:
    # Recording a second derivative is for the op, which refuses it where it is asked for.
    op = torch.ops.fastrec.pointwise_attention_backward
    run = backward if ctx.eager and not torch.is_grad_enabled() else op
    dq, dk, dv, d_position, d_time = run(d_out, *ctx.saved_tensors, *ctx.rest)
    _, _, _, position, time, *_ = ctx.saved_tensors
    tables = (None if position is None else d_position, None if time is None else d_time)
    return dq, dk, dv, *tables, *(None,) * 10


class Eager(torch.autograd.Function):
    """The op with gradients and without the dispatcher, which costs several times as much."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        output = forward(*inputs)
        _save(ctx, inputs, output)
        ctx.eager = True
        return output

    backward = staticmethod(_gradients)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("pointwise_attention: second derivatives are not implemented")


_OPTIONS = (
    "Tensor? position_bias, Tensor? time_bias, Tensor? time_edges, Tensor? timestamps, "
    "Tensor? query_timestamps, Tensor? lengths, Tensor? cu_seqlens, Tensor? targets, "
    "float scale, float? norm_length, bool causal, str? backend=None"
)
define_op(
    f"pointwise_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> Tensor",
    forward,
    _fake,
    backward=_gradients,
    save=_save,
)
define_op(
    f"pointwise_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
    backward=_no_second_derivative,
)

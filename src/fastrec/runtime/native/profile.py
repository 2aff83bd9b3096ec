"""The cost of each step of a program, and the least time that the machine allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec import kernels
from fastrec.runtime.native.buffers import ITEMSIZE, View, product
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

if TYPE_CHECKING:
    from fastrec.measure.ceilings import Ceilings

# Step kind -> the op whose kernel it calls, where that is not its own name.
_KERNELS = {
    "attention": "padded_attention",
    "layer_norm": "layer_norm_quantize",
    "linear": "grouped_linear",
    "linear_bf16": "grouped_linear",
    "matmul": "grouped_linear",
    "causal_attention": "window_sparse_attention",
    "masked_attention": "padded_attention",
    "linear_int8": "sparse_int8_linear",
    "quantize": "activation_quantize",
    "resumed_attention": "padded_attention",
}
_GROUP_BYTES = 128  # of sparse_int8_linear: 32 outputs x 4 inputs
# Shown as the op: what users know it by.
_SHOWN = ("attention", "linear_int8")


@dataclass(frozen=True)
class Cost:
    """Of one step in one call. Each byte counts once, however often a kernel comes back to it.

    Attributes:
        constants, activations, written: bytes read of weights and tables, read of what other steps
            or the caller wrote, and written.
        macs: multiply-adds; None where there are none or they are not known.
        peak: the precision that they run in, a key of ``Ceilings.peaks``; "" where the step only
            moves bytes, None where its arithmetic is not known.
        density: of its weights' groups, where it has weights.
    """

    constants: int
    activations: int
    written: int
    macs: int | None = None
    peak: str | None = None
    density: float | None = None


@dataclass(frozen=True)
class Request:
    """Sizes and inputs of the call that is profiled."""

    sizes: dict[str, int]
    arrays: list[np.ndarray]


def profile(
    program: Program, request: Request, taken: np.ndarray, ceilings: Ceilings | None = None
) -> list[dict[str, Any]]:
    """One row a step; see ``PlanEngine.profile``.

    Args:
        program: the steps.
        request: of the calls that were timed.
        taken: [calls, steps] int64, nanoseconds.
        ceilings: of this machine, or None.
    """
    costs = [cost(step, request) for step in program.steps]
    # Between two calls of a step all others use the caches too.
    resident = sum(c.constants for c in costs) + max(
        (c.activations + c.written for c in costs), default=0
    )
    rows = []
    for step, of, ns in zip(program.steps, costs, taken.T, strict=True):
        row = _row(step, of, float(ns.min()) / 1e3, float(np.median(ns)) / 1e3)
        if ceilings is not None:
            row.update(_limit(of, row["us"], resident, ceilings))
        rows.append(row)
    return rows


def cost(step: Step, request: Request) -> Cost:
    """Bytes and multiply-adds of a step."""
    constants = _bytes((v for v in step.inputs if v.buffer.data is not None), request)
    activations = _bytes((v for v in step.inputs if v.buffer.data is None), request)
    written = _bytes(step.outputs, request)
    known = _COSTS.get(step.kind)
    if known is None:
        return Cost(constants, activations, written)
    return known(step, request, Cost(constants, activations, written))


def _bytes(views: Iterable[View], request: Request) -> int:
    """Of the distinct elements: what is broadcast, or read under two shapes, counts once."""
    total = {}
    for view in views:
        sizes = tuple(
            size.at(request.sizes)
            for size, stride in zip(view.shape, view.strides, strict=True)
            if stride.number != 0
        )
        count = int(np.prod(sizes)) * ITEMSIZE[view.dtype]
        total[view.buffer, view.offset, count] = count
    return sum(total.values())


def _moves(step: Step, request: Request, moved: Cost) -> Cost:
    return Cost(moved.constants, moved.activations, moved.written, None, "")


def _gather(step: Step, request: Request, moved: Cost) -> Cost:
    # Of the table, the rows asked for.
    table = step.table
    rows = min(product(step.ids.shape).at(request.sizes), table.shape[0].coefficient)
    row = table.shape[1].coefficient * ITEMSIZE[table.dtype] + 4 * (step.scale is not None)
    return Cost(rows * row, moved.activations, moved.written, None, "")


def _linear(step: Step, request: Request, moved: Cost) -> Cost:
    results, inputs = product(step.y.shape), step.x.shape[-1]
    macs = (results * inputs).at(request.sizes)
    return Cost(moved.constants, moved.activations, moved.written, macs, "fp32", 1.0)


def _linear_bf16(step: Step, request: Request, moved: Cost) -> Cost:
    peak = "bf16" if _isa_of("grouped_linear", step) == "avx512bf16" else "fp32"
    return replace(_linear(step, request, moved), peak=peak)


def _linear_int8(step: Step, request: Request, moved: Cost) -> Cost:
    outputs, inputs = step.fields["outputs"], step.fields["inputs"]
    values = step.values.buffer.data
    assert values is not None
    density = values.nbytes / _GROUP_BYTES / (_ceil_div(outputs, 32) * _ceil_div(inputs, 4))
    macs = round(product(step.y.shape).at(request.sizes) * inputs * density)
    return Cost(moved.constants, moved.activations, moved.written, macs, "int8", round(density, 4))


def _attention(step: Step, request: Request, moved: Cost) -> Cost:
    batch, heads, rows, dims = (size.at(request.sizes) for size in step.q.shape)
    keys = step.k.shape[2].at(request.sizes)
    total, activations = batch * keys, moved.activations
    if step.lengths is not None and step.lengths.buffer.space == "input":
        lengths = request.arrays[step.lengths.buffer.index].reshape(-1)
        total = int(np.where(lengths == 0, keys, lengths).sum())
        activations -= 2 * 4 * heads * dims * (batch * keys - total)
    macs = 2 * total * heads * rows * dims
    return Cost(moved.constants, activations, moved.written, macs, "fp32")


def _causal_attention(step: Step, request: Request, moved: Cost) -> Cost:
    # Query i meets i + 1 keys.
    batch, heads, rows, dims = (size.at(request.sizes) for size in step.q.shape)
    macs = batch * heads * dims * rows * (rows + 1)
    return Cost(moved.constants, moved.activations, moved.written, macs, "fp32")


def _masked_attention(step: Step, request: Request, moved: Cost) -> Cost:
    # Which scores the mask hides is known at a call alone: all count but those a causal one leaves
    # out.
    batch, heads, rows, dims = (size.at(request.sizes) for size in step.q.shape)
    keys = step.k.shape[2].at(request.sizes)
    scores = sum(min(keys, i + 1) for i in range(rows)) if step.causal else rows * keys
    macs = 2 * batch * heads * dims * scores
    return Cost(moved.constants, moved.activations, moved.written, macs, "fp32")


def _grouped_linear(step: Step, request: Request, moved: Cost) -> Cost:
    macs = product(step.y.shape).at(request.sizes) * step.weight.shape[2].coefficient
    return Cost(moved.constants, moved.activations, moved.written, macs, "fp32", 1.0)


def _separable_projection(step: Step, request: Request, moved: Cost) -> Cost:
    # Padding, which the kernel leaves out, counts.
    macs = product((*step.x.shape, step.depthwise.shape[1])).at(request.sizes)
    macs += product(step.y.shape).at(request.sizes) * step.pointwise.shape[2].coefficient
    return Cost(moved.constants, moved.activations, moved.written, macs, "fp32", 1.0)


def _window_sparse_attention(step: Step, request: Request, moved: Cost) -> Cost:
    # Scores of the pattern without padding, cut at the sequence's ends.
    batch, heads, rows, dims = (size.at(request.sizes) for size in step.q.shape)
    keys = step.k.shape[2].at(request.sizes)
    int8 = step.kind == "window_sparse_attention_int8"
    scores = 0
    for far in step.distances:
        distances = [*range(1, min(step.window, max(rows, keys) - 1) + 1), *far]
        shifts = [0, *(-d for d in distances), *([] if step.causal else distances)]
        pairs = sum(max(0, min(rows, keys - s) - max(0, -s)) for s in shifts)
        scores += pairs * (heads if len(step.distances) == 1 else 1)
    macs = 2 * batch * scores * dims
    peak = "int8" if int8 else "fp32"
    return Cost(moved.constants, moved.activations, moved.written, macs, peak)


def _matmul(step: Step, request: Request, moved: Cost) -> Cost:
    macs = product((*step.y.shape, step.a.shape[-1])).at(request.sizes)
    return Cost(moved.constants, moved.activations, moved.written, macs, "fp32")


_COSTS: dict[str, Callable[[Step, Request, Cost], Cost]] = {
    "attention": _attention,
    "causal_attention": _causal_attention,
    "cumsum": _moves,
    "gather": _gather,
    "grouped_linear": _grouped_linear,
    "layer_norm": _moves,
    "linear": _linear,
    "linear_bf16": _linear_bf16,
    "linear_int8": _linear_int8,
    "map": _moves,
    "masked_attention": _masked_attention,
    "matmul": _matmul,
    "quantize": _moves,
    "reduce": _moves,
    "separable_projection": _separable_projection,
    "softmax": _moves,
    "window_sparse_attention": _window_sparse_attention,
    "window_sparse_attention_int8": _window_sparse_attention,
}


def _row(step: Step, of: Cost, best: float, median: float) -> dict[str, Any]:
    op = _KERNELS.get(step.kind, step.kind)
    shown = op if step.kind in _SHOWN else step.kind
    if step.kind == "gather" and step.scale is not None:
        op = shown = "int8_embedding"
    isa = _isa_of(op, step)
    constants = {v.buffer for v in step.inputs if v.buffer.data is not None}
    return {
        "module": step.module,
        "op": shown,
        "kernel": f"cpu/{isa}" if isa else "cpu",
        "density": of.density,
        "bytes": sum(b.data.nbytes for b in constants if b.data is not None),
        "read_bytes": of.constants + of.activations,
        "written_bytes": of.written,
        "macs": of.macs,
        "us": best,
        "us_median": median,
        "why": "a step of the plan, run without Python",
    }


def _isa_of(op: str, step: Step) -> str | None:
    """The instruction set of the kernel that runs an op of ours now; None where it has but one."""
    kernel_isa = getattr(getattr(kernels._compiled.native(), op, None), "kernel_isa", None)
    if kernel_isa is None:
        return None
    name: str = kernel_isa(True) if step.kind == "linear_bf16" else kernel_isa()
    return name


def _limit(of: Cost, us: float, resident: int, ceilings: Ceilings) -> dict[str, Any]:
    """The time that the machine allows at best, and by what."""
    peak = ceilings.peaks.get(of.peak, 0.0) if of.peak else 0.0
    if of.peak is None or (of.macs and not peak):
        return {"limit": None, "limit_us": None, "of_limit": None}
    # 10^9 a second is 10^3 a microsecond; a multiply-add is two operations. Weights come from where
    # those of a whole call lie, activations from where the step before has left them.
    moved = of.activations + of.written
    bounds = {
        "bandwidth": of.constants / (ceilings.reading(resident) * 1e3)
        + moved / (ceilings.reading(moved) * 1e3)
    }
    if of.macs:
        bounds[f"{of.peak} peak"] = 2 * of.macs / (peak * 1e3)
    name = max(bounds, key=lambda n: bounds[n])
    return {
        "limit": name,
        "limit_us": bounds[name],
        "of_limit": bounds[name] / us if us > 0 else None,
    }


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)

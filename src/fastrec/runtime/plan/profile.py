"""What each step of a plan costs: its kernel, bytes, multiply-adds and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec import kernels
from fastrec.runtime.plan.ir import Step, product

if TYPE_CHECKING:
    from fastrec.runtime.plan.engine import PlanEngine

# Step kind -> the op whose kernel it calls.
_KERNELS = {
    "attention": "padded_attention",
    "linear_int8": "sparse_int8_linear",
}
_PROFILED_CALLS = 5


def profile(engine: PlanEngine, arrays: list[np.ndarray]) -> list[dict[str, Any]]:
    """One row a step: kind, module, kernel, bytes of its constants, best time in microseconds.

    Runs the plan a few times on ``arrays``, one request of the model's inputs.
    """
    plan = engine._plan
    best = np.full(len(plan.steps), np.iinfo(np.int64).max)
    for _ in range(_PROFILED_CALLS):
        taken = np.zeros_like(best)
        engine._call(arrays, taken)
        best = np.minimum(best, taken)
    sizes = {
        symbol: arrays[i].shape[d]
        for symbol, (i, d) in zip(plan.symbols, engine._sizes, strict=True)
    }
    return [_row(s, int(ns), sizes) for s, ns in zip(plan.steps, best, strict=True)]


def _row(step: Step, nanoseconds: int, sizes: dict[str, int]) -> dict[str, Any]:
    op = _KERNELS.get(step.kind)
    constants = {v.buffer for v in step.inputs if v.buffer.data is not None}
    if step.kind == "gather" and len(step.inputs) == 3:
        op = "int8_embedding"
    native = kernels._compiled.native()
    isa = getattr(native, op).kernel_isa() if op else None
    row: dict[str, Any] = {
        "module": step.module,
        "op": op or step.kind,
        "kernel": f"cpu/{isa}" if isa else "cpu",
        "density": None,
        "bytes": sum(b.data.nbytes for b in constants if b.data is not None),
        "macs": None,
        "us": nanoseconds / 1e3,
        "why": "a step of the plan, run without Python",
    }
    results = product(step.output.shape).at(sizes)
    if step.kind == "linear":
        row["density"], row["macs"] = 1.0, results * step.inputs[0].shape[-1].at(sizes)
    elif step.kind == "linear_int8":
        outputs, inputs = step.integers[:2]
        values = step.inputs[1].buffer.data
        assert values is not None
        density = len(values) / (ceil_div(outputs, 32) * ceil_div(inputs, 4))
        row["density"], row["macs"] = round(density, 4), round(results * inputs * density)
    elif step.kind == "attention":
        row["macs"] = 2 * results * step.inputs[1].shape[2].at(sizes)
    return row


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)

"""The engine that runs a plan in one native call. numpy only: torch is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, IdRangeError
from fastrec.runtime.engine import Engine, closed_loop
from fastrec.runtime.plan.emit import executor
from fastrec.runtime.plan.ir import Plan, Step, product

# csrc/cpu/engine/plan.h: Fault.
_ID_OUT_OF_RANGE, _NOT_A_NUMBER = 1, 2
# Step kind -> the op whose kernel it calls.
_KERNELS = {
    "attention": "padded_attention",
    "linear_int8": "sparse_int8_linear",
}
_PROFILED_CALLS = 5


class PlanEngine(Engine):
    """A plan and its native executor; any number of threads may call it at once."""

    spin_s = 0.0005  # the kernels' pool parks after 0.3 ms

    def __init__(self, plan: Plan, **about: Any) -> None:
        super().__init__(**about)
        self._plan = plan
        self._executor, self._constants = executor(plan)
        # Where each symbol's size is found: (input, dimension).
        self._sizes = [
            next(
                (i, d)
                for i, buffer in enumerate(plan.inputs)
                for d, size in enumerate(buffer.shape)
                if size.symbols == (symbol,) and size.coefficient == 1
            )
            for symbol in plan.symbols
        ]
        self._out_shape = plan.output.shape

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        with kernels.call_threads(self.threads):
            return self._call(arrays)

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """Requests per second with a client a thread, each request on one core.

        Raises:
            ArgumentError: no request.
        """

        def alone(*request: np.ndarray) -> np.ndarray:
            with kernels.call_threads(1):
                return self._call(self.spec.check(request)[0])

        return closed_loop(alone, requests, self.threads, seconds)

    def _call(self, arrays: list[np.ndarray], step_ns: np.ndarray | None = None) -> np.ndarray:
        arrays = [np.ascontiguousarray(a) for a in arrays]
        sizes = [arrays[i].shape[d] for i, d in self._sizes]
        known = dict(zip(self._plan.symbols, sizes, strict=True))
        out = np.empty([size.at(known) for size in self._out_shape], np.float32)
        fault, step, value = self._executor.run(
            sizes,
            [a.ctypes.data for a in arrays],
            out.ctypes.data,
            0 if step_ns is None else step_ns.ctypes.data,
        )
        if fault:
            raise self._error(fault, self._plan.steps[step], value)
        return out

    @staticmethod
    def _error(fault: int, step: Step, value: int) -> Exception:
        where = step.module or step.kind
        if fault == _ID_OUT_OF_RANGE:
            rows = step.inputs[1].shape[0] if step.kind == "gather" else "L + 1"
            return IdRangeError(where, f"ids in 0..{rows} - 1", value)
        return ArgumentError(where, "an input of numbers", "a NaN")

    def profile(self, arrays: list[np.ndarray]) -> list[dict[str, Any]]:
        """One row a step: kind, module, kernel, bytes of its constants, best time in microseconds.

        Runs the plan a few times on ``arrays``, one request of the model's inputs.
        """
        best = np.full(len(self._plan.steps), np.iinfo(np.int64).max)
        for _ in range(_PROFILED_CALLS):
            taken = np.zeros_like(best)
            self._call(arrays, taken)
            best = np.minimum(best, taken)
        sizes = {
            symbol: arrays[i].shape[d]
            for symbol, (i, d) in zip(self._plan.symbols, self._sizes, strict=True)
        }
        return [_row(s, int(ns), sizes) for s, ns in zip(self._plan.steps, best, strict=True)]

    def close(self) -> None:
        """Free the executor and the constants."""
        if not self._closed:
            del self._executor, self._constants
        super().close()


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

"""The engine that runs a plan in one native call. numpy only: torch is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, IdRangeError
from fastrec.runtime.engine import Engine, closed_loop
from fastrec.runtime.plan.emit import executor
from fastrec.runtime.plan.ir import Plan, Step
from fastrec.runtime.plan.profile import profile

# csrc/cpu/engine/plan.h: Fault.
_ID_OUT_OF_RANGE, _NOT_A_NUMBER = 1, 2


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
            [out.ctypes.data],
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
        return profile(self, arrays)

    def close(self) -> None:
        """Free the executor and the constants."""
        if not self._closed:
            del self._executor, self._constants
        super().close()

"""The engine of ``fastrec.compile(model, backend="cuda")``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastrec.errors import DeviceError, DtypeError
from fastrec.runtime.cuda.config import Sizes
from fastrec.runtime.cuda.executor import Executor
from fastrec.runtime.cuda.launches import Launch
from fastrec.runtime.cuda.roofline import GPUS
from fastrec.runtime.engine import Engine


class CudaEngine(Engine):
    """A ranker as a few launches. Inputs on the host are checked and staged; inputs on the engine's
    GPU are enqueued on the current stream, and so is the result, which stays there."""

    spin_s = 0.0

    def __init__(self, executor: Executor, **about: Any) -> None:
        super().__init__(**about)
        self._executor = executor

    def __call__(self, *inputs: Any) -> Any:
        """As every engine; also takes tensors on the GPU (or anything with DLPack there, then a
        tensor comes back). Ids on the GPU are not read to be checked: one outside its table counts
        as a row of zeros."""
        if inputs and not isinstance(inputs[0], np.ndarray):
            tensors = [_tensor(f.name, t) for f, t in zip(self.spec.fields, inputs, strict=False)]
            if len(tensors) == len(inputs) and any(not t.is_cpu for t in tensors):
                return self._run_there(tensors)
        return super().__call__(*inputs)

    def _sizes(self, shapes: Sequence[Sequence[int]]) -> Sizes:
        stages = self._executor.stages
        users, length = shapes[stages.history]
        return Sizes(users, length, shapes[stages.candidates][1])

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        return self._executor(arrays, self._sizes([a.shape for a in arrays]))

    def _run_there(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        self._require_open()
        device = self._executor.device
        for f, tensor in zip(self.spec.fields, tensors, strict=True):
            if tensor.device != device:
                raise DeviceError(f.name, f"a tensor on {device}, as the engine is", tensor.device)
            if str(tensor.dtype) != f"torch.{f.dtype}":
                raise DtypeError(f.name, f.dtype, tensor.dtype)
        shapes = [tuple(t.shape) for t in tensors]
        self.spec.sizes(shapes)
        return self._executor.there(tensors, self._sizes(shapes))

    def launches(self, users: int, length: int, candidates: int) -> list[Launch]:
        """The launches of a request of these sizes, in order."""
        return self._executor.describe(Sizes(users, length, candidates)).launches

    def close(self) -> None:
        """Free graphs, buffers and constants."""
        if not self._closed:
            super().close()
            del self._executor


def launch_rows(launches: Sequence[Launch], dtype: str) -> list[dict[str, Any]]:
    """A row of ``describe()`` a launch, and one for all of them.

    ``bytes`` and ``flops`` (2 a multiply-add) of a request of the examples' sizes, each constant
    and activation counted once a launch; ``roofline_us``: the least time that the data sheet of a
    GPU allows. That is a bound, not a prediction of what a small request takes: launches and
    barriers, which it leaves out, then weigh more.
    """
    rows: list[dict[str, Any]] = []
    for launch in launches:
        kind = "int8" if launch.int8 else dtype
        rows.append(
            {
                "op": "launch",
                "module": launch.name,
                "kernel": f"triton/{launch.kernel.__name__}",
                "grid": list(launch.grid),
                "config": str(launch.config),
                "bytes": launch.bytes,
                "flops": 2 * launch.macs,
                "roofline_us": {
                    name: round(1e6 * gpu.seconds(launch.bytes, launch.macs, kind), 3)
                    for name, gpu in GPUS.items()
                },
                "why": "fused: what lies between stays on the chip",
            }
        )
    total = {
        "op": "request",
        "module": "",
        "launches": len(launches),
        "bytes": sum(row["bytes"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "roofline_us": {
            name: round(sum(row["roofline_us"][name] for row in rows), 3) for name in GPUS
        },
        "why": "the launches of one request, replayed as one graph",
    }
    return [*rows, total]


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    if hasattr(value, "__cuda_array_interface__"):
        return torch.as_tensor(value, device="cuda")
    raise DtypeError(name, "a tensor, or an array with DLPack", type(value).__name__)

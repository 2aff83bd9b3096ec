"""The part that the three torch backends share: an engine around a callable on tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrec.errors import BackendError, not_installed
from fastrec.exporters.trace import evaluated
from fastrec.measure.packages import missing, package_versions
from fastrec.runtime.engine import Engine
from fastrec.runtime.threads import with_torch_threads

# libgomp's idle workers, measured.
SPIN_S = 0.012
Forward = Callable[..., torch.Tensor]


def reason_no_torch() -> str | None:
    """Why torch cannot be used, or None."""
    return not_installed("torch", "torch") if missing("torch") else None


def torch_versions() -> dict[str, str]:
    """Version of torch."""
    return package_versions("torch")


class TorchEngine(Engine):
    """Runs ``forward`` on tensors with torch's thread count set around the call."""

    spin_s = SPIN_S

    def __init__(self, forward: Forward, *, torch_threads: int, **about: Any) -> None:
        super().__init__(**about)
        self._forward = forward
        self._torch_threads = torch_threads

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        # from_numpy warns about arrays that cannot be written to (memory-mapped ones are such).
        tensors = [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays]
        scores: np.ndarray = self._run_torch(tensors, arrays).numpy()
        return scores

    def _run_torch(self, tensors: Sequence[torch.Tensor], arrays: list[np.ndarray]) -> torch.Tensor:
        scores: torch.Tensor = with_torch_threads(self._torch_threads, self._forward, *tensors)
        return scores

    def close(self) -> None:
        """Drop the model."""
        if not self._closed:
            del self._forward
        super().close()


def inference(module: Callable[..., torch.Tensor], *, autocast: bool = False) -> Forward:
    """``module`` under inference mode, its output as float32."""

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            if autocast:
                with torch.autocast("cpu", torch.bfloat16):
                    return module(*inputs).float()
            return module(*inputs).float()

    return forward


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy whose parameters and float buffers are bfloat16."""
    return copy.deepcopy(evaluated(model)).to(torch.bfloat16)


def float_inputs(inputs: Sequence[torch.Tensor]) -> bool:
    """Whether any input is a float tensor (autocast casts them, ``.to(bfloat16)`` does not)."""
    return any(t.is_floating_point() for t in inputs)


def refuse_requantising(backend: str, precision: str | None, quantised: str | None) -> None:
    """Raise BackendError where a precision is asked of a model that holds int8 modules."""
    if quantised is not None and precision not in (None, "int8"):
        raise BackendError(f"{backend}: {quantised} is int8 already, it cannot run as {precision}")
    if quantised is not None and precision == "int8" and backend != "native":
        raise BackendError(f"{backend}: {quantised} is int8 already; use precision=None")

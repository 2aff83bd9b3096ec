"""Which mixed precision a device gains from."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import torch.nn.functional as F

# bf16 must win by this much to be worth its rounding; also keeps the choice stable from run to run.
_WORTHWHILE = 1.2


def _step_seconds(dtype: torch.dtype | None) -> float:
    """One forward and backward pass of one tower layer's size."""
    weight = torch.ones(1024, 1024, requires_grad=True)
    x = torch.ones(256, 1024, requires_grad=True)
    start = time.perf_counter()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        F.linear(x, weight).sum().backward()
    return time.perf_counter() - start


@lru_cache(maxsize=1)
def _cpu_gains() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # One thread, best of several in turn: the answer must not depend on who else is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(_step_seconds(None), _step_seconds(torch.bfloat16)) for _ in range(8)]
    finally:
        torch.set_num_threads(threads)
    exact, rounded = (min(column) for column in zip(*pairs, strict=True))
    return exact > _WORTHWHILE * rounded


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes it natively and faster than float32, else None.

    On a CPU this is measured once a process (a few tens of milliseconds): many CPUs accept bf16 and
    emulate it slowly. bfloat16 keeps float32's range, so no loss scaling is needed.
    """
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_gains() else None
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None

"""Helpers of all Triton backends. Imports triton only where a kernel is launched."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch

from fastrec import env
from fastrec.errors import not_installed
from fastrec.kernels._compiled import Signature

TRITON_DTYPES = ("float32", "bfloat16", "float16")


def triton_can_run(signature: Signature) -> str | None:
    """``can_run`` of every Triton backend; asked once per signature."""
    if signature.dtype not in TRITON_DTYPES:
        return f"it computes in {', '.join(TRITON_DTYPES)}, the input is {signature.dtype}"
    return reason_missing(signature.device)


def reason_missing(device: str) -> str | None:
    """Why no Triton kernel runs on tensors of this device, or None if they do."""
    if importlib.util.find_spec("triton") is None:
        return not_installed("triton", "cuda")
    if env.triton_interpret():
        return None if device == "cpu" else "TRITON_INTERPRET is set: only CPU tensors are computed"
    if device != "cuda":
        return f"it runs on a GPU, the input is on {device} (TRITON_INTERPRET=1 interprets it)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on that, on its current stream."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def fp32_precision() -> str:
    """How a float32 ``tl.dot`` multiplies: as torch's own matmul is told to."""
    if torch.version.hip is None and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``number``, within [least, most]."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)

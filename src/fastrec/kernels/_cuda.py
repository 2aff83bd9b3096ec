"""Access to the CUDA kernels: compiled (``fastrec._native_cuda``), else csrc/cuda through CuPy.

A wheel without the compiled part ships the sources; CuPy's NVRTC compiles what a call needs at its
first use and keeps it in CuPy's own cache (``CUPY_CACHE_DIR``, ``~/.cupy``), keyed by source,
options, architecture and instantiation.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrec.errors import BackendError, not_installed
from fastrec.kernels._compiled import Signature

# The oldest architecture whose kernels are built: cp.async and the matrix instructions used.
OLDEST = (8, 0)
NVRTC_OPTIONS = ("--std=c++17",)

# kernel(grid, block, params, shared_bytes, stream); params is a ctypes structure, given by value.
Launch = Callable[[tuple[int, ...], tuple[int, ...], Any, int, int], None]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from fastrec import _native_cuda
    except ImportError as error:
        return None, f"the compiled CUDA kernels are not installed ({error})"
    return _native_cuda, None


def compiled() -> ModuleType | None:
    """``fastrec._native_cuda``, or None where it was not built or does not load."""
    return _load()[0]


def loader() -> str | None:
    """How kernels get here: "compiled", "cupy", or None for not at all."""
    if compiled() is not None:
        return "compiled"
    return "cupy" if reason_without_cupy() is None else None


def reason_without_cupy() -> str | None:
    """Why CuPy can't compile the kernels, or None if it can (a GPU aside)."""
    if importlib.util.find_spec("cupy") is None:
        return not_installed("CuPy, which would compile them,", "cuda")
    return None if sources() else "their sources, which CuPy would compile, are missing"


def reason_missing() -> str | None:
    """Why no CUDA kernel can be loaded, or None if they can (a GPU aside)."""
    if loader() is not None:
        return None
    return f"{_load()[1]}; {reason_without_cupy()}"


@functools.cache
def _reason_for_device() -> str | None:
    import torch

    if torch.version.hip is not None:
        return "it runs on NVIDIA's GPUs, torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, the GPU has {found}"
    return None


def cuda_can_run(signature: Signature) -> str | None:
    """``can_run`` of every CUDA C++ backend; asked once per signature."""
    if signature.device != "cuda":
        return f"it runs on a GPU, the input is on {signature.device}"
    return _reason_for_device() or reason_missing()


@functools.cache
def sources() -> Path | None:
    """The folder of csrc/cuda's headers: the wheel's copy, or the repository's own."""
    package = Path(__file__).parents[1]
    for folder in (package / "_cuda_sources", package.parents[1] / "csrc" / "cuda"):
        if (folder / "common.cuh").is_file():
            return folder
    return None


@functools.cache
def source(header: str) -> str:
    """A header of csrc/cuda as one text, what it includes in place.

    One text, because CuPy's cache knows a source by its text and not by what it includes.

    Raises:
        BackendError: there are no sources here.
    """
    folder = sources()
    if folder is None:
        raise BackendError(f"CUDA sources: {reason_without_cupy()}")
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text().replace("#pragma once\n", "")
        # Only headers that NVRTC compiles too: standard ones are in angle brackets.
        return re.sub(r'^#include "([^"]+)"\n', lambda m: expand(m[1]), text, flags=re.MULTILINE)

    return expand(header)


def nvrtc_kernel(header: str, name: str, *, cooperative: bool = False) -> Launch:
    """A kernel that CuPy compiles for the current GPU when it is first launched.

    Args:
        header: the file in csrc/cuda, e.g. ``"sparse_int8_linear/sparse_int8_linear.cuh"``.
        name: the instantiation as C++ writes it, e.g. ``"fastrec::f<64, true>"``.
        cooperative: blocks may wait for each other (all of them fit the GPU at once).
    """
    import cupy
    import numpy as np

    raw = cupy.RawModule(
        code=source(header),
        options=NVRTC_OPTIONS,
        name_expressions=(name,),
        enable_cooperative_groups=cooperative,
    )
    # By GPU: CuPy loads a kernel for the current one, where its limits are set too.
    allowed: dict[int, int] = {}
    kernel: Any = None

    def launch(
        grid: tuple[int, ...], block: tuple[int, ...], params: Any, shared_bytes: int, stream: int
    ) -> None:
        nonlocal kernel
        if kernel is None:
            kernel = raw.get_function(name)
        device = cupy.cuda.runtime.getDevice()
        if allowed.get(device, 48 * 1024) < shared_bytes:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
            allowed[device] = shared_bytes
        value = np.frombuffer(bytes(params), dtype=np.dtype((np.void, len(bytes(params)))))
        with cupy.cuda.ExternalStream(stream):
            kernel(grid, block, (value,), shared_mem=shared_bytes)

    return launch

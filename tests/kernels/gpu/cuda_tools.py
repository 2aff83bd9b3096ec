"""Compiles CUDA sources with NVRTC for GPUs that are not there, and reads machine code."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from fastrec.kernels import _cuda

# The architectures that setup.py builds for.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


@functools.cache
def nvrtc_reason() -> str | None:
    """Why nothing can be compiled with NVRTC, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (fastrec-kernels[cuda])"
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy's own RuntimeError or ImportError, by version
        return f"NVRTC does not load: {error}"
    return None


def nvrtc_cubin(source: str, arch: str, names: tuple[str, ...]) -> bytes:
    """The machine code of these instantiations, as CuPy would have it made on such a GPU."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "fastrec.cu", [], [])
    for name in names:
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, [*_cuda.NVRTC_OPTIONS, f"--gpu-architecture={arch}"])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    # CuPy takes the last byte for the end of a string.
    binary: bytes = nvrtc.getCUBIN(program) + b"\0"
    nvrtc.destroyProgram(program)
    return binary


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm, which Triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        if (path := Path(folder) / "backends/nvidia/bin" / name).is_file():
            return path
    pytest.skip(f"there is no {name} here; Triton brings one")


def resource_usage(binary: Path, arch: str | None = None) -> dict[str, dict[str, int]]:
    """By kernel: REG, STACK, SHARED, LOCAL, ... of a cubin, or of one architecture of a library."""
    command = [str(tool("cuobjdump")), "--dump-resource-usage", str(binary)]
    if arch is not None:
        command[1:1] = ["--gpu-architecture", arch]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", usage)}
        for name, usage in found
    }


def machine_code(binary: Path, arch: str | None = None) -> dict[str, str]:
    """By kernel: the disassembly."""
    command = [str(tool("cuobjdump")), "--dump-sass", str(binary)]
    if arch is not None:
        command[1:1] = ["--gpu-architecture", arch]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))

"""Compiles Triton kernels for GPUs that are not there, and reads what came out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (fastrec-kernels[cuda])")

# Name: backend, architecture, threads of a warp, shared memory of one program in bytes, and the
# instructions that multiply matrices there.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024, r"\bmma\.sync"),
    "sm_90": ("cuda", 90, 32, 227 * 1024, r"\bwgmma\.mma_async"),
    "sm_100": ("cuda", 100, 32, 227 * 1024, r"\btcgen05\.mma"),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024, r"\bv_mfma_"),
}


def compiled(
    kernel: Any,
    target: str,
    pointers: dict[str, str],
    constants: dict[str, Any],
    unaligned: tuple[str, ...] = (),
    **options: int,
) -> Any:
    """``pointers``: dtype by argument (other numbers than int32 too); what is neither that nor a
    constant is an int32. Arguments are multiples of 16 unless they are in ``unaligned``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (n,): [["tt.divisibility", 16]]
            for n, name in enumerate(names)
            if name not in constants and name not in unaligned
        },
    )
    backend, arch, warp, _, _ = TARGETS[target]
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)


def check(
    kernel: Any, target: str, folder: Path, *, matrices: bool, rows: int | None = None
) -> None:
    """Asserts on matrix instructions, shared memory and spills; ``rows`` are those of a tile."""
    backend, _, _, shared_bytes, instruction = TARGETS[target]
    if backend == "cuda" and rows is not None and rows < 64:
        instruction = TARGETS["sm_80"][4]  # the newer ones take at least 64 rows
    text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    assert not matrices or re.search(instruction, text), f"no {instruction} for {target}"
    assert kernel.metadata.shared <= shared_bytes
    if backend == "hip":
        # Scalars are spilled to lanes of vector registers; what is spilled to memory is private.
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        spills += re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)
        assert len(spills) == 2
    else:
        import triton.backends.nvidia as nvidia

        binary = folder / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        if not tool.is_file():
            pytest.skip("this triton brings no cuobjdump, which tells the spills")
        command = [tool, "--dump-resource-usage", binary]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spills = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
        assert len(spills) >= 2, usage
    assert set(spills) == {"0"}, f"{target}: registers are spilled: {spills}"

"""The compiled CUDA part: it loads where no driver is, and holds code for every GPU it is meant
for; without it, the same sources compile under NVRTC."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tools import ARCHITECTURES, nvrtc_cubin, nvrtc_reason, tool

from fastrec import env
from fastrec.errors import CudaError
from fastrec.kernels import _cuda

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="nothing here is Triton's")
native = _cuda.compiled()
built = pytest.mark.skipif(native is None, reason="the CUDA part was not built: no nvcc")
HEADERS = sorted(
    path.relative_to(folder).as_posix()
    for folder in [_cuda.sources() or Path()]
    for path in folder.glob("*/*.cuh")
)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
def test_where_nvcc_is_the_compiled_part_is() -> None:
    assert native is not None


@built
def test_it_imports_without_torch_and_says_its_version() -> None:
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from fastrec import _native_cuda; print(_native_cuda.runtime_version())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) >= 12000


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_driver_cuda_says_so_in_a_typed_error() -> None:
    assert native is not None
    # 35: no driver, or one too old; 100: a driver, and no GPU.
    with pytest.raises(CudaError, match=r"^device_count: CUDA error (35|100): \w+") as caught:
        native.device_count()
    assert caught.value.code in (35, 100)


@built
def test_nothing_of_torch_or_of_a_driver_is_linked() -> None:
    assert native is not None
    assert native.__file__ is not None
    needed = subprocess.run(["ldd", native.__file__], capture_output=True, text=True).stdout
    assert not re.search(r"libcuda\.|libcudart|torch|c10", needed), needed


@built
@pytest.mark.skipif(not HEADERS, reason="no kernel is built yet")
def test_it_holds_machine_code_for_every_architecture() -> None:
    assert native is not None
    assert native.__file__ is not None
    listed = subprocess.run(
        [tool("cuobjdump"), "--list-elf", native.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert set(ARCHITECTURES) <= set(re.findall(r"\.(sm_\w+)\.cubin", listed)), listed


@pytest.mark.skipif(nvrtc_reason() is not None, reason=str(nvrtc_reason()))
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("header", ["common.cuh", *HEADERS])
def test_every_header_compiles_under_nvrtc(header: str, arch: str) -> None:
    nvrtc_cubin(_cuda.source(header), arch, ())

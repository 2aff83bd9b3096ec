"""Runs this folder's tests of results in Triton's interpreter, which needs no GPU.

In a process of its own: Triton reads TRITON_INTERPRET where a kernel's module is imported, and an
interpreted kernel can't be compiled.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastrec import env

FOLDER = Path(__file__).parent


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (fastrec-kernels[cuda])",
)
@pytest.mark.skipif(env.triton_interpret(), reason="this is the interpreted run")
def test_every_kernel_agrees_with_the_reference() -> None:
    files = sorted(FOLDER.glob("test_*_triton.py"))
    assert files
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout[-1000:]

"""Other interpreters of the process: without the compiled part, and told so, instead of hanging."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import importlib
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ImportError:
        pass
else:
    raise SystemExit("no interpreters")
own = interpreters.create()
run = getattr(interpreters, "exec", None) or interpreters.run_string
run(own, "from fastrec.kernels import _compiled; print(_compiled.reason_missing(), flush=True)")
"""


def test_another_interpreter_has_no_compiled_part() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM], capture_output=True, text=True, timeout=60
    )
    if "no interpreters" in done.stderr:
        pytest.skip("this Python has none")
    assert done.returncode == 0, done.stderr
    assert "main interpreter" in done.stdout

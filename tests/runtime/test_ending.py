"""The interpreter ends while a daemon thread is inside an engine's call."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastrec.runtime import available_backends

_PROGRAM = """
import atexit, sys, threading, time, torch, fastrec
from torch import nn
model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)]).eval()
x = torch.randn(256, 256)
engine = fastrec.compile(model, (x,), sys.argv[1], 1)
wanted = engine(x)
atexit.register(lambda: print("still right", torch.equal(engine(x), wanted)))
done = threading.Event()

def call():
    while True:
        engine(x)
        done.set()

for _ in range(2):
    threading.Thread(target=call, daemon=True).start()
done.wait()
"""


@pytest.mark.parametrize("backend", ["native", "onnxruntime", "openvino", "torch"])
def test_a_daemon_thread_in_a_call_ends_with_the_process(backend: str) -> None:
    if (reason := available_backends()[backend]) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, backend], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "still right True"

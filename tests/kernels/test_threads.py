"""Thread counts, concurrent callers and forks; csrc/cpu/tests holds the pool itself to account."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrec import kernels
from fastrec.errors import ArgumentError
from fastrec.kernels._compiled import native, reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def run(code: str, **environment: str) -> str:
    """Output of code in a fresh interpreter, with thread settings as they are at its start."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def bench_call() -> tuple[Callable[..., torch.Tensor], tuple[Any, ...], dict[str, Any]]:
    spec = kernels.registry()["sparse_int8_linear"]
    args, kwargs = next(s for s in spec.samples() if s.bench).make()
    return spec.function, args, kwargs


def test_a_count_set_is_checked_and_capped() -> None:
    most = native().max_threads()
    assert 1 <= most <= len(os.sched_getaffinity(0))
    try:
        kernels.set_num_threads(10_000)
        assert kernels.num_threads() == most
        kernels.set_num_threads(1)
        assert kernels.num_threads() == 1
        for bad in (0, -1, 1.5, True):
            with pytest.raises(
                ArgumentError, match=f"threads: expected an integer >= 1, got {bad}"
            ):
                kernels.set_num_threads(bad)
    finally:
        kernels.set_num_threads(None)


def test_a_block_outranks_the_process_and_ends() -> None:
    most = native().max_threads()
    try:
        kernels.set_num_threads(1)
        with kernels.call_threads(64):
            assert kernels.num_threads() == most
            with kernels.call_threads(1):
                assert kernels.num_threads() == 1
            assert kernels.num_threads() == most
        assert kernels.num_threads() == 1
        with pytest.raises(ArgumentError, match="threads"), kernels.call_threads(0):
            pass
    finally:
        kernels.set_num_threads(None)


def test_a_block_holds_for_its_own_thread_only() -> None:
    seen: list[int] = []
    try:
        kernels.set_num_threads(native().max_threads())
        with kernels.call_threads(1):
            other = threading.Thread(target=lambda: seen.append(kernels.num_threads()))
            other.start()
            other.join()
    finally:
        kernels.set_num_threads(None)
    assert seen == [native().max_threads()]


def test_lowered_torch_threads_lower_ours_unless_set() -> None:
    code = """
import torch
from fastrec import kernels
kernels.registry()
most = kernels.num_threads()
torch.set_num_threads(1)
assert kernels.num_threads() == 1
kernels.set_num_threads(most)
assert kernels.num_threads() == most
kernels.set_num_threads(None)
assert kernels.num_threads() == 1
torch.set_num_threads(10_000)
print(kernels.num_threads() == most)
"""
    assert run(code, OMP_NUM_THREADS="1000") == "True"


def test_torch_is_followed_wherever_the_kernels_are_loaded_first() -> None:
    code = """
from fastrec import kernels
kernels.num_threads()
kernels.registry()
import torch
torch.set_num_threads(1)
print(kernels.num_threads())
"""
    assert run(code) == "1"
    assert (
        run(
            "from fastrec import kernels; import torch; print(kernels.num_threads())",
            OMP_NUM_THREADS="1",
        )
        == "1"
    )


def test_affinity_is_the_ceiling() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from fastrec import kernels
kernels.set_num_threads(8)
print(kernels.num_threads())
"""
    assert run(code) == "1"


def test_concurrent_callers_get_their_own_results() -> None:
    function, args, kwargs = bench_call()
    expected = function(*args, **kwargs)
    wrong: list[int] = []

    def call(caller: int) -> None:
        with kernels.call_threads(1 + caller % 3):
            results = (function(*args, **kwargs) for _ in range(20))
            wrong.extend(caller for result in results if not torch.equal(result, expected))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_child_computes_too() -> None:
    # In a fresh process: forking pytest with torch's own threads running is another matter.
    code = """
import os, sys
import torch
from fastrec import kernels
torch.set_num_threads(1)  # libgomp, torch's own pool, does not survive a fork
kernels.set_num_threads(64)
spec = kernels.registry()["sparse_int8_linear"]
args, kwargs = next(s for s in spec.samples() if s.bench).make()
expected = spec.function(*args, **kwargs)
child = os.fork()
if child == 0:
    same = all(torch.equal(spec.function(*args, **kwargs), expected) for _ in range(20))
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run(code)

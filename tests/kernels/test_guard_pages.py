"""Every op on inputs that end at an unreadable page: a byte read too far ends the process."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fastrec.kernels import OP_IDS
from fastrec.kernels._compiled import reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

# Each op in a child of its own, forked once torch is imported; a line is written before each case.
CODE = """
import copy, ctypes, mmap, os, sys
import torch
from fastrec import kernels

torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(value):
    if isinstance(value, (list, tuple)):
        return type(value)(guarded(item) for item in value)
    if isinstance(value, torch.Tensor):
        if value.numel() == 0:
            return value
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
        flat = value.detach().as_strided((extent,), (1,), value.storage_offset())
        size = extent * value.element_size()
        inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        area = mmap.mmap(-1, inside + mmap.PAGESIZE)
        kept.append(area)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
        if libc.mprotect(ctypes.c_void_p(begin + inside), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno())
        memory = (ctypes.c_char * size).from_address(begin + inside - size)
        copied = torch.frombuffer(memory, dtype=value.dtype).copy_(flat)
        return copied.as_strided(value.shape, value.stride())
    if any(isinstance(part, torch.Tensor) for part in getattr(value, "__dict__", {}).values()):
        value = copy.copy(value)
        for name, part in list(vars(value).items()):
            if isinstance(part, torch.Tensor):
                object.__setattr__(value, name, guarded(part))
    return value

def run(spec):
    cases = 0
    for sample in spec.samples():
        if sample.macs > 300_000:
            continue
        args, kwargs = sample.make()
        args, kwargs = guarded(args), {name: guarded(part) for name, part in kwargs.items()}
        for isa in kernels.available_isas():
            print("at", spec.op_id, isa, sample.name, flush=True)
            with kernels.force_isa(isa):
                spec.function(*args, **kwargs)
            cases += 1
    return cases

for spec in [*kernels.registry().values(), None]:
    child = os.fork()
    if child == 0:
        if spec is None:  # the guard itself is at work
            tensor = guarded(torch.arange(5.0))
            print("at", "guard", flush=True)
            ctypes.string_at(tensor.data_ptr(), 21)
        os._exit(0 if run(spec) else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("done", "guard" if spec is None else spec.op_id, status, flush=True)
"""


def test_nothing_is_read_beyond_an_input() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = dict(re.findall(r"^done (\S+) (\S+)$", done.stdout, re.M))
    assert results.pop("guard") == "-11", "the guard page does not stop a read"
    lines = done.stdout.splitlines()
    failures = [
        f"{lines[i - 1]}: exit status {line.split()[2]}"
        for i, line in enumerate(lines)
        if line.startswith("done") and not line.startswith("done guard") and line.split()[2] != "0"
    ]
    assert set(results) == set(OP_IDS)
    assert not failures, done.stderr

"""Interrupt a writer before each of its changes to the file system; run as a script by test_files.

Python's audit events come before each file that is opened and each name that is made, renamed or
removed, so a fork that is killed at the n-th of them leaves the state between two steps.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrec import files
from fastrec.compress import load, save
from fastrec.data.storage import FolderWriter, read_manifest
from fastrec.errors import StorageError
from fastrec.runtime import artifact
from fastrec.train.checkpoint import load_model, save_model

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.chmod")
NEEDS_SPACE = ("os.rename", "os.mkdir")
UNTOUCHED, REFUSED, HIDDEN = 0, 3, 4  # exit codes of a fork that was not killed


def model(value: int) -> nn.Module:
    layer = nn.Linear(64, 64)
    nn.init.constant_(layer.weight, value)
    return nn.Sequential(layer)


def write_data(path: Path, value: int) -> None:
    with FolderWriter(path, force=True) as writer:
        writer.write("items", np.full(5000, value))
        writer.commit({"value": value})


def write_file(path: Path, value: int) -> None:
    with files.atomic_write(path) as draft:
        draft.write_text(json.dumps([value] * 5000))


def value_of(module: Any) -> int:
    return int(module[0].weight.unique())


def value_of_data(path: Path) -> int:
    read_manifest(path, verify=True)
    return int(np.unique(np.load(path / "items.npy")).item())


def write_engine(path: Path, value: int) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes([value]) * 5000)

    artifact.write(path, {"backend": "none"}, fill)


def value_of_engine(path: Path) -> int:
    artifact.read(path)
    return (path / "weights.bin").read_bytes()[0]


VERBS: dict[str, tuple[Callable[[Path, int], Any], Callable[[Path], int]]] = {
    "file": (write_file, lambda path: int(json.loads(path.read_text())[0])),
    "save": (lambda path, v: save(model(v), path), lambda path: value_of(load(path, model(0)))),
    "prepare": (write_data, value_of_data),
    "engine": (write_engine, value_of_engine),
    "checkpoint": (
        lambda path, v: save_model(path, model(v)),
        lambda path: value_of(load_model(path, model(0))),
    ),
}


def in_fork(interrupt: Callable[[], list[int]], write: Callable[[], Any]) -> int:
    """The exit code of a fork that writes, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        left = interrupt()
        write()
        code = UNTOUCHED if left[0] > 0 else HIDDEN
    except StorageError:
        code = REFUSED
    except BaseException as error:
        sys.stderr.write(repr(error))
        sys.stderr.flush()
        code = 1
    os._exit(code)


def killed_at(number: int) -> list[int]:
    """Die before the ``number``-th event from now on; the events left until then."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return left


def disk_full_at(number: int) -> list[int]:
    """Fail at the ``number``-th event that needs space; the events left until then."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in NEEDS_SPACE:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)
    return left


def disk_full_after(size: int) -> list[int]:
    """Let no file grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return [0]


def check(verb: str, folder: Path) -> int:
    """Interrupt everywhere; how many interruptions there were."""
    write, read = VERBS[verb]
    path = folder / "target"
    write(path, 1)
    done = 0

    def survives(interrupt: Callable[[], list[int]], expected: int) -> bool:
        """Interrupt, read, write again; False where nothing was interrupted."""
        nonlocal done
        code = in_fork(interrupt, lambda: write(path, 2))
        assert code in (expected, HIDDEN, UNTOUCHED), (verb, done, code)
        files.recover(path)
        value = read(path)
        assert value == 2 if code == UNTOUCHED else value in (1, 2), (verb, done, value)
        write(path, 1)
        assert read(path) == 1
        assert [p.name for p in folder.iterdir()] == ["target"], "drafts are left"
        done += 1
        return code != UNTOUCHED

    exchange = files._exchange
    for swap in (exchange, lambda first, second: False):
        files._exchange = swap
        for interrupt, code in ((killed_at, -signal.SIGKILL), (disk_full_at, REFUSED)):
            numbers = itertools.count(1)
            while survives(partial(interrupt, next(numbers)), code):
                pass
    for size in (0, 1, 100, 4096, 8192):
        assert survives(partial(disk_full_after, size), REFUSED)
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(str(check(sys.argv[1], Path(sys.argv[2]))))

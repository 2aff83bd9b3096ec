"""An engine in a worker process: when it dies or hangs, its requests run elsewhere.

A thread here hands calls over a socket pair and blocks without the GIL; the worker
(``fastrec.serving.core.worker``) runs one call after another. Frames are two lengths, a JSON
header and raw array bytes: nothing is executed that a peer sends, and no pickle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, ServingError
from fastrec.serving.core.engines import Callee, EngineDied, EntryPoint, Source, ThreadEngine
from fastrec.spec import InputSpec

_LENGTHS = struct.Struct("<IQ")
_MOST_BYTES = 1 << 32


def send(peer: socket.socket, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """One frame; the arrays' dtypes and shapes go into the header."""
    plain = [np.ascontiguousarray(a) for a in arrays]
    header = {**header, "arrays": [[a.dtype.str, a.shape] for a in plain]}
    text = json.dumps(header).encode()
    total = sum([a.nbytes for a in plain])
    parts = [_LENGTHS.pack(len(text), total), text, *(a.tobytes() for a in plain)]
    peer.sendall(b"".join(parts))


def receive(peer: socket.socket) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The next frame.

    Raises:
        EOFError: the peer is gone.
        ServingError: the frame is malformed.
    """
    text_bytes, total = _LENGTHS.unpack(_exactly(peer, _LENGTHS.size))
    if total > _MOST_BYTES:
        raise ServingError(f"a frame of {total} bytes")
    header = json.loads(_exactly(peer, text_bytes))
    data = _exactly(peer, total)
    arrays, at = [], 0
    for dtype, shape in header["arrays"]:
        array = np.frombuffer(data, dtype, int(np.prod(shape, dtype=np.int64)), at).reshape(shape)
        arrays.append(array)
        at += array.nbytes
    return header, arrays


def _exactly(peer: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            got = peer.recv_into(view)
        except ConnectionError as error:
            raise EOFError from error
        if not got:
            raise EOFError
        view = view[got:]
    return data


def start_worker(module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process ``python -m module FD``, and our end of its socket."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", module, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    return process, ours


def worker_socket(argv: Sequence[str]) -> socket.socket:
    """In such a process: its end of the socket.

    Ctrl-C in a terminal goes to the whole group; the server decides when its workers end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return socket.socket(fileno=int(argv[0]))


class _Remote:
    """The worker as something to call; lives in the handle's thread."""

    def __init__(self, source: str | Path | EntryPoint, threads: int | None, name: str) -> None:
        self.process, self._peer = start_worker("fastrec.serving.core.worker")
        self.name = name
        self.recall: float | None = None
        order: dict[str, Any] = {"threads": threads}
        if isinstance(source, EntryPoint):
            order |= {"entry": source.name, "options": dict(source.options)}
        else:
            order |= {"path": os.fspath(source)}
        try:
            header, _ = self._exchange(order, ())
        except EngineDied:
            self.close()
            raise
        if "error" in header:
            self.close()
            raise ServingError(header["error"])
        self.spec = InputSpec.from_dict(header["spec"])

    def __call__(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        header, arrays = self._exchange({}, inputs)
        if "error" in header:
            raise ServingError(header["error"])
        self.recall = header["recall"]
        return dict(zip(header["names"], arrays, strict=True))

    def _exchange(
        self, order: dict[str, Any], inputs: Sequence[np.ndarray]
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            send(self._peer, order, inputs)
            return receive(self._peer)
        except (EOFError, OSError) as error:
            raise EngineDied(f"the worker of {self.name} is gone") from error

    def close(self) -> None:
        """Ask the worker to end (its socket closes), then see that it has."""
        self._peer.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ProcessEngine(ThreadEngine):
    """An engine in its own process."""

    def __init__(self, name: str, source: Source, threads: int | None = None) -> None:
        if not isinstance(source, str | Path | EntryPoint):
            raise ArgumentError(
                "source", "a path or an EntryPoint, which another process can open", source
            )
        super().__init__(name, source, threads)
        self._remote: _Remote | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, once it is open."""
        return None if self._remote is None else self._remote.process.pid

    def _make(self) -> Callee:
        assert isinstance(self._source, str | Path | EntryPoint)
        self._remote = _Remote(self._source, self._threads, self.name)
        return self._remote

    async def open(self) -> None:
        await super().open()
        assert self._remote is not None
        loop = asyncio.get_running_loop()
        try:
            # Readable once the process has ended; Linux has it since 5.3, elsewhere the next call
            # finds out.
            watch = os.pidfd_open(self._remote.process.pid)
        except (AttributeError, OSError):
            return

        def ended() -> None:
            loop.remove_reader(watch)
            os.close(watch)
            self.on_death()

        loop.add_reader(watch, ended)

    def kill(self) -> bool:
        if self._remote is not None:
            with contextlib.suppress(ProcessLookupError):
                self._remote.process.send_signal(signal.SIGKILL)
        return True

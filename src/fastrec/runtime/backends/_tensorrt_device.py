"""CUDA for a TensorRT engine: buffers, copies, a stream and graphs, through CuPy.

CuPy and not torch, so that a process that serves a saved engine imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastrec.errors import not_installed
from fastrec.measure.packages import missing


def reason_missing() -> str | None:
    """Why there is no GPU to run on, or None."""
    if missing("cupy"):
        return not_installed("cupy", "tensorrt")
    from cupy.cuda import runtime

    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"CUDA sees no GPU: {error}"
    return None if count else "CUDA sees no GPU"


def gpu() -> dict[str, str]:
    """Name and compute capability of the current GPU: what a plan is built for."""
    from cupy.cuda import runtime

    about = runtime.getDeviceProperties(runtime.getDevice())
    name = about["name"]
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": f"{about['major']}.{about['minor']}",
    }


class Buffer:
    """Memory of one tensor on the GPU and, page-locked, on the host."""

    def __init__(self, items: int, dtype: np.dtype) -> None:
        import cupy

        self._bytes = max(items, 1) * dtype.itemsize
        self._device = cupy.cuda.alloc(self._bytes)
        self._pinned = cupy.cuda.alloc_pinned_memory(self._bytes)
        self.host = np.frombuffer(self._pinned, dtype, max(items, 1))
        self.address = int(self._device.ptr)

    def upload(self, items: int, stream: Any) -> None:
        """Enqueue the copy of the first ``items`` to the GPU."""
        from cupy.cuda import runtime

        self._copy(self.address, self.host.ctypes.data, items, runtime.memcpyHostToDevice, stream)

    def download(self, items: int, stream: Any) -> None:
        """Enqueue the copy of the first ``items`` back."""
        from cupy.cuda import runtime

        self._copy(self.host.ctypes.data, self.address, items, runtime.memcpyDeviceToHost, stream)

    def _copy(self, target: int, source: int, items: int, kind: int, stream: Any) -> None:
        from cupy.cuda import runtime

        size = items * self.host.dtype.itemsize
        runtime.memcpyAsync(target, source, size, kind, stream.ptr)


def new_stream() -> Any:
    """A stream of its own: the default one would wait for all others."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def captured(stream: Any, work: Callable[[], None]) -> Any:
    """A CUDA graph of what ``work`` enqueues on ``stream``.

    Raises:
        RuntimeError: what is enqueued cannot be captured; the stream is usable again.
    """
    with stream:
        stream.begin_capture()
        try:
            work()
        except BaseException:
            # An open capture would swallow everything that comes after it.
            if stream.is_capturing():
                stream.end_capture()
            raise
        return stream.end_capture()

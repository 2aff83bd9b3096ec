"""Tuned launch configurations: which one was fastest on a GPU, by op and shape.

One JSON file for an op on a kind of GPU, in the user's cache (``FASTREC_CACHE_DIR``, else
``$XDG_CACHE_HOME/fastrec``, else ``~/.cache/fastrec``), named by a digest of the kernel's source,
its compiler's flags and the GPU's name and architecture: a changed kernel does not find old
entries. Tables that ship with the package lie in ``kernels/tuned`` and have the same form; there is
one only where a GPU was measured. What no table knows is up to the op's heuristic.

    {"op": "sparse_int8_linear", "gpu": "NVIDIA H200 (9.0)", "digest": "...",
     "entries": {"64 32 32 1": {"rows": 64, "wide": 2, ...}}}
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fastrec import env
from fastrec.files import atomic_write

Config = TypeVar("Config")

SHIPPED = Path(__file__).parent / "tuned"


@functools.cache
def gpu_name(index: int) -> str:
    """Name and compute capability of a GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"


class Table:
    """The entries of one op on one kind of GPU; read once, at the first question."""

    def __init__(self, op_id: str, gpu: str, source: str, flags: Iterable[str]) -> None:
        self.op_id, self.gpu = op_id, gpu
        text = "\0".join((op_id, gpu, source, *flags))
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def path(self) -> Path:
        """Where entries of this machine's own are kept."""
        return env.cache_dir() / "tuned" / f"{self.op_id}-{self.digest}.json"

    @functools.cached_property
    def entries(self) -> dict[str, dict[str, int]]:
        """This machine's own before those shipped; a file that can't be read counts as none."""
        return self._read(SHIPPED / self.path.name) | self._read(self.path)

    def _read(self, path: Path) -> dict[str, dict[str, int]]:
        try:
            found = json.loads(path.read_text())
            entries = found["entries"] if found["digest"] == self.digest else {}
            return {str(key): dict(value) for key, value in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def find(self, key: str, possible: Iterable[Config]) -> Config | None:
        """The configuration for a shape, if it is known and among the possible ones."""
        entry = self.entries.get(key)
        return next((config for config in possible if asdict(config) == entry), None)  # type: ignore[call-overload]

    def content(self) -> dict[str, Any]:
        """The content of this machine's own file; the same form as a shipped table."""
        entries = self._read(self.path)
        return {"op": self.op_id, "gpu": self.gpu, "digest": self.digest, "entries": entries}

    def keep(self, key: str, config: Any) -> None:
        """Adds an entry and writes the file, whole or not at all."""
        content = self.content()
        content["entries"][key] = asdict(config)
        with atomic_write(self.path, sync=False) as draft:
            draft.write_text(json.dumps(content, indent=2))
        self.entries[key] = asdict(config)


def fastest(possible: Iterable[Config], time_ms: Callable[[Config], float]) -> Config:
    """The configuration with the least time."""
    return min(possible, key=time_ms)


def device_time_ms(call: Callable[[], None], calls: int = 20, replays: int = 15) -> float:
    """Median time of a call on the current GPU: graphs of many, replayed between events, so that
    what the host does for a launch is not in it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return sorted(times[1:])[replays // 2]

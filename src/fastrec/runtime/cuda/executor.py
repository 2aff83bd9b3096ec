"""Runs a ranker's launches: a bucket of sizes a captured graph, inputs staged in pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from fastrec.kernels._gpu import power_of_two
from fastrec.runtime.cuda.config import Sizes, TowerConfig
from fastrec.runtime.cuda.launches import HEADER, Bucket
from fastrec.runtime.cuda.stages import RankerStages
from fastrec.runtime.cuda.weights import Weights

_MOST = 1 << 30


class Staged:
    """A bucket with its way in and out. On a GPU the copies and launches are one graph."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        pinned = bucket.on_gpu
        self.host_in = torch.zeros(len(bucket.inputs), dtype=torch.int32, pin_memory=pinned)
        self.host_out = torch.zeros(len(bucket.scores), pin_memory=pinned)
        self._in, self._out = self.host_in.numpy(), self.host_out.numpy()
        self.graph = self.launches_graph = None
        if bucket.on_gpu:
            self._in[:3] = bucket.sizes  # warm-up on padding: every row of every tile
            self._warm_up()
            self.graph = self._captured(self._everything)
            self.launches_graph = self._captured(self._launch)

    def _launch(self) -> None:
        for launch in self.bucket.launches:
            launch()

    def _everything(self) -> None:
        self.bucket.inputs.copy_(self.host_in, non_blocking=True)
        self._launch()
        self.host_out.copy_(self.bucket.scores, non_blocking=True)

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._everything()
        stream.synchronize()

    @staticmethod
    def _captured(function) -> torch.cuda.CUDAGraph:  # type: ignore[no-untyped-def]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
        return graph

    def stage(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> None:
        """Write a request to the host's side; users beyond it have no history."""
        staged, places = self._in, self.bucket.places
        staged[:3] = sizes
        length = self.bucket.stages.length
        staged[places[length] : places[length] + self.bucket.sizes.users] = 0
        for index, begin in places.items():
            array = arrays[index]
            staged[begin : begin + array.size] = array.reshape(-1)

    def run(self) -> np.ndarray:
        """Scores of what is staged, float32 [rows of the bucket]; a view."""
        if self.graph is None:
            self._everything()
        else:
            self.graph.replay()
            torch.cuda.current_stream().synchronize()
        return self._out

    def run_there(self, tensors: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """Scores of a request that lies on the device, enqueued on the current stream; a view."""
        inputs, places = self.bucket.inputs, self.bucket.places
        inputs[:HEADER].copy_(torch.tensor([*sizes, *[0] * (HEADER - 3)], dtype=torch.int32))
        self.bucket.lengths[: self.bucket.sizes.users].zero_()
        for index, begin in places.items():
            tensor = tensors[index]
            inputs[begin : begin + tensor.numel()].copy_(tensor.reshape(-1))
        if self.launches_graph is None:
            self._launch()
        else:
            self.launches_graph.replay()
        return self.bucket.scores


class Executor:
    """A ranker on one device; safe to call from several threads, one request at a time."""

    def __init__(
        self,
        stages: RankerStages,
        *,
        dtype: torch.dtype,
        device: torch.device,
        precision: str,
        persistent: bool,
    ) -> None:
        self.stages, self.device = stages, device
        self.precision, self.persistent = precision, persistent
        self.weights = Weights(stages, dtype, device)
        self.programs = 1
        if device.type != "cpu":
            self.programs = torch.cuda.get_device_properties(device).multi_processor_count
        self._buckets: dict[Sizes, Staged] = {}
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def bucket_of(self, sizes: Sizes) -> Sizes:
        """The bucket that serves these sizes: each rounded up to a power of two."""
        return Sizes(*(power_of_two(size, 1, _MOST) for size in sizes))

    def staged(self, sizes: Sizes) -> Staged:
        """The bucket for these sizes; compiled and captured at its first use."""
        key = self.bucket_of(sizes)
        if key not in self._buckets:
            self._buckets[key] = Staged(self.made(key))
        return self._buckets[key]

    def made(self, sizes: Sizes, config: TowerConfig | None = None) -> Bucket:
        """Buffers and launches of these sizes; with a tile for the tower, or the best known."""
        return Bucket(
            self.stages,
            self.weights,
            sizes,
            self.precision,
            self.persistent,
            self.programs,
            amd=torch.version.hip is not None,
            config=config,
        )

    def describe(self, sizes: Sizes) -> Bucket:
        """The launches of a request of just these sizes, for what they count."""
        return self.made(sizes)

    def __call__(self, arrays: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        """Scores float32 [users, candidates] of checked inputs in the host's memory."""
        shape, rows = (sizes.users, sizes.candidates), sizes.users * sizes.candidates
        with self._lock, self._here():
            staged = self.staged(sizes)
            staged.stage(arrays, sizes)
            return np.array(staged.run()[:rows]).reshape(shape)

    def there(self, tensors: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """Scores float32 [users, candidates] of inputs on the device, on the current stream."""
        rows = sizes.users * sizes.candidates
        with self._lock, self._here():
            scores = self.staged(sizes).run_there(tensors, sizes)[:rows]
            # A copy: the next request writes the buffer.
            return scores.clone().reshape(sizes.users, sizes.candidates)

    def _here(self) -> _Ordered:
        return _Ordered(self)


class _Ordered:
    """Makes the executor's device current, and its buffers' next use wait for their last, which
    may have been on another stream."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        on_gpu = executor.device.type != "cpu"
        self.device = torch.cuda.device(executor.device) if on_gpu else None

    def __enter__(self) -> None:
        if self.device is None:
            return
        self.device.__enter__()
        if self.executor._last is not None:
            torch.cuda.current_stream().wait_event(self.executor._last)

    def __exit__(self, *raised: object) -> None:
        if self.device is None:
            return
        last = self.executor._last = self.executor._last or torch.cuda.Event()
        last.record(torch.cuda.current_stream())
        self.device.__exit__(*raised)

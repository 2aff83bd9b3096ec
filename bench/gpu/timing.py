"""Device time by replayed CUDA graphs, ours and a rival's in turn; host latency apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastrec.measure.timing import Samples

Call = Callable[[], Any]
ROUNDS = 25


class Replay:
    """A graph of one call a set of inputs, so that a replay finds nothing of the last in L2."""

    def __init__(self, graph: Any, calls: int) -> None:
        self.graph, self.calls = graph, calls

    @staticmethod
    def of(calls: Sequence[Call]) -> Replay:
        """Captures the calls; they have run before, so that nothing is compiled within."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return Replay(graph, len(calls))

    def ns(self) -> float:
        """One replay, between events, in ns a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e6 * float(begin.elapsed_time(end)) / self.calls


def in_turn(replays: Sequence[Replay], rounds: int = ROUNDS) -> list[Samples]:
    """Each replay once a round, in an order that changes by round; the first round counts not."""
    times = np.zeros((len(replays), rounds + 1))
    for number in range(rounds + 1):
        for i in np.roll(np.arange(len(replays)), number):
            times[i, number] = replays[i].ns()
    return [Samples(row[1:, None]) for row in times]


def host_us(call: Call, calls: int = 50) -> float:
    """Median wall clock of a call and the wait for its result, in us."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)

"""Triton's queue policies, asserted through Triton's client: its texts, its codes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from fastrec.serving.core import Pool, Queueing, QueuePolicy, ServingConfig
from fastrec.spec import InputField, InputSpec

grpcclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

SPEC = InputSpec((InputField("item", ("B", "m"), rows=100),), {"B": (1, 1), "m": (1, None)})


class Gate:
    """An engine that answers when it is let; ids above 0 show who came in which order."""

    def __init__(self):
        self.spec = SPEC
        self.open = threading.Event()
        self.open.set()
        self.seen = []

    def __call__(self, item):
        self.open.wait(20)
        self.seen += [int(v) for v in item[:, 0] if v]
        return item.astype(np.float32)


class Calls:
    """Requests in flight, and what became of each."""

    def __init__(self, url):
        self.client = grpcclient.InferenceServerClient(url)
        self.results = {}
        self.done = threading.Semaphore(0)

    def send(self, number, **settings):
        tensor = grpcclient.InferInput("item", [1, 1], "INT64")
        tensor.set_data_from_numpy(np.full((1, 1), number))

        def callback(result, error):
            self.results[number] = error
            self.done.release()

        self.client.async_infer("gate", [tensor], callback, **settings)
        time.sleep(0.05)  # requests arrive in the order they are sent

    def wait(self, n):
        for _ in range(n):
            assert self.done.acquire(timeout=20)


@pytest.fixture
def serve(start):
    clients = []

    def begin(**lanes):
        gate = Gate()
        config = ServingConfig(
            lanes=Queueing(express_priorities=(), **lanes),
            pool=Pool(kind="thread"),
            slo=ServingConfig().slo.__class__(latency_ms=60_000),
        )
        server = start(None, config)
        server.run(server.server.core.load("gate", lambda: gate))
        gate.seen.clear()
        gate.open.clear()
        clients.append(Calls(server.grpc))
        clients[-1].send(1)  # keeps the engine busy
        return gate, clients[-1]

    yield begin
    for calls in clients:
        calls.client.close()


def test_max_queue_size(serve):
    gate, calls = serve(default_policy=QueuePolicy(max_queue_size=2))
    for number in (2, 3, 4, 5):
        calls.send(number)
    calls.wait(2)
    gate.open.set()
    calls.wait(3)
    for number in (4, 5):
        assert "Exceeds maximum queue size" in str(calls.results[number])
        assert "UNAVAILABLE" in str(calls.results[number])
    assert [calls.results[n] for n in (1, 2, 3)] == [None] * 3


def test_a_timeout_in_the_queue_is_told_while_the_engine_is_busy(serve):
    gate, calls = serve(default_policy=QueuePolicy(default_timeout_us=200_000))
    began = time.monotonic()
    calls.send(2)
    calls.wait(1)
    # Triton looks every 500 ms while its instances are busy.
    assert time.monotonic() - began < 0.45
    assert "Request timeout expired" in str(calls.results[2])
    assert "UNAVAILABLE" in str(calls.results[2])
    gate.open.set()
    calls.wait(1)


def test_timeout_override(serve):
    gate, calls = serve(
        default_policy=QueuePolicy(default_timeout_us=20_000_000, allow_timeout_override=True)
    )
    calls.send(2, timeout=100_000)
    calls.wait(1)
    assert "Request timeout expired" in str(calls.results[2])
    gate.open.set()
    calls.wait(1)


def test_delayed_requests_run_behind_the_others(serve):
    policy = QueuePolicy(default_timeout_us=100_000, timeout_action="DELAY")
    gate, calls = serve(policies={2: policy}, default_policy=QueuePolicy())
    calls.send(2, priority=2)
    time.sleep(0.15)
    calls.send(3, priority=3)
    gate.open.set()
    calls.wait(3)
    assert calls.results == {1: None, 2: None, 3: None}
    assert gate.seen.index(3) < gate.seen.index(2)


def test_priority_levels(serve):
    gate, calls = serve(priority_levels=3, default_priority=3)
    for number, priority in ((2, 3), (3, 2), (4, 1), (5, 0)):
        calls.send(number, priority=priority)
    gate.open.set()
    calls.wait(5)
    assert gate.seen == [1, 4, 3, 2, 5]

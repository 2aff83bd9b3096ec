"""Requests spread over real servers on loopback."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc", reason="fastrec-kernels[serve] is not installed")

from serving_process import Running

from fastrec.errors import ArgumentError
from fastrec.serving.client import Client
from fastrec.serving.core import SLO, Kind, Rejected, ServingConfig
from fastrec.serving.core.probes import Probing
from fastrec.spec import InputField, InputSpec

SPEC = InputSpec(
    (InputField("user", ("B",), rows=100), InputField("candidate", ("B", "m"), rows=100)),
    {"B": (1, None), "m": (1, None)},
)
INPUTS = {"user": np.array([3]), "candidate": np.arange(8)[None]}


class Sleeper:
    """Scores after a delay that can be changed."""

    spec = SPEC

    def __init__(self, seconds: float, factor: float) -> None:
        self.seconds, self.factor = seconds, factor
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, user: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        self.gate.wait()
        return (candidate * self.factor).astype(np.float32)


@pytest.fixture
def serve() -> Any:
    running: list[Running] = []

    def begin(engine: Sleeper, slo_ms: float = 10_000.0, **options: Any) -> str:
        server = Running(None, ServingConfig(slo=SLO(slo_ms)), http_port=None, **options)
        running.append(server)
        server.run(server.server.core.load("ranker", lambda: engine))
        return server.grpc

    begin.running = running  # type: ignore[attr-defined]
    yield begin
    for server in running:
        server.close()


async def load(client: Client, requests: int, at_once: int) -> None:
    left = iter(range(requests))

    async def work() -> None:
        for _ in left:
            await client.infer("ranker", INPUTS)

    await asyncio.gather(*(work() for _ in range(at_once)))


def test_outputs_come_back_by_name(serve: Callable[..., str]) -> None:
    async def main() -> None:
        async with Client([serve(Sleeper(0.0, 2.0))]) as client:
            outputs = await client.infer("ranker", INPUTS, timeout_s=20, priority=1)
            np.testing.assert_array_equal(outputs["scores"], 2.0 * INPUTS["candidate"])
            named = await client.infer("ranker", INPUTS, outputs=["scores"], request_id="r1")
            assert list(named) == ["scores"]

    asyncio.run(main())


def test_a_slow_server_gets_what_it_can_do(serve: Callable[..., str]) -> None:
    fast, slow = serve(Sleeper(0.002, 1.0)), serve(Sleeper(0.2, 1.0))

    async def main() -> None:
        async with Client([fast, slow]) as client:
            await load(client, 300, 4)
            # It could do a hundredth; at random it would be given half of them. Where the fast one
            # holds more requests than usual it counts as hot, and the slow one gets the next.
            assert client.sent[slow] < 0.35 * client.sent[fast], client.sent

    asyncio.run(main())


def test_requests_of_a_server_that_is_gone_go_elsewhere(serve: Callable[..., Any]) -> None:
    first, second = serve(Sleeper(0.001, 1.0)), serve(Sleeper(0.001, 1.0))

    async def main() -> None:
        async with Client([first, second]) as client:
            await load(client, 20, 2)
            gone = serve.running.pop(0)  # type: ignore[attr-defined]
            await asyncio.to_thread(gone.close)
            before = client.sent[second]
            await load(client, 60, 4)
            assert client.sent[second] >= before + 60

    asyncio.run(main())


def test_a_server_that_hangs_is_not_waited_for(serve: Callable[..., str]) -> None:
    stuck = Sleeper(0.0, 1.0)
    first, second = serve(stuck), serve(Sleeper(0.001, 1.0))

    async def main() -> None:
        async with Client([first, second], rng=random.Random(0)) as client:
            stuck.gate.clear()
            done = await asyncio.gather(
                *(client.infer("ranker", INPUTS, timeout_s=2.0) for _ in range(40)),
                return_exceptions=True,
            )
            stuck.gate.set()
            late = [d for d in done if isinstance(d, Rejected)]
            assert all(r.kind is Kind.EXPIRED for r in late)
            # All at once, before anything is known of either: each goes to one of two by chance,
            # and more than 32 of 40 to the same one in 3 of 100,000 runs.
            assert len(late) <= 32
            # From then on the other one takes everything that the first has not proved it can do.
            await load(client, 40, 2)

    asyncio.run(main())


def test_nobody_there_is_not_ready() -> None:
    async def main() -> None:
        async with Client(["127.0.0.1:1", "127.0.0.1:2"], probing=Probing(timeout_s=0.5)) as client:
            with pytest.raises(Rejected) as refused:
                await client.infer("ranker", INPUTS, timeout_s=5.0)
            assert refused.value.kind is Kind.NOT_READY

    asyncio.run(main())


def test_refusals_keep_their_kind(serve: Callable[..., str]) -> None:
    slow = serve(Sleeper(0.05, 1.0))

    async def main() -> None:
        async with Client([slow]) as client:
            with pytest.raises(Rejected) as unknown:
                await client.infer("other", INPUTS)
            assert unknown.value.kind is Kind.NOT_FOUND
            with pytest.raises(Rejected) as invalid:
                await client.infer("ranker", {"user": INPUTS["user"]})
            assert invalid.value.kind is Kind.INVALID
            with pytest.raises(Rejected) as late:
                await client.infer("ranker", INPUTS, timeout_s=0.001)
            assert late.value.kind in (Kind.EXPIRED, Kind.DEADLINE_INFEASIBLE)
            assert client.sent[slow] == 3

    asyncio.run(main())


@pytest.mark.parametrize("targets", [[], ["a:1", "a:1"]])
def test_targets_are_checked(targets: list[str]) -> None:
    async def main() -> None:
        with pytest.raises(ArgumentError, match="targets"):
            Client(targets)

    asyncio.run(main())

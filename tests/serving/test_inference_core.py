"""The core with real threads and processes: warm pools, releases, faults."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from fastrec.errors import ArgumentError, ConfigError, DtypeError, ServingError
from fastrec.serving.core import (
    SLO,
    Canary,
    EntryPoint,
    InferenceCore,
    Kind,
    Pool,
    Queueing,
    Rejected,
    Request,
    RolloutChanged,
    ServingConfig,
)
from fastrec.serving.core.process import ProcessEngine
from fastrec.spec import InputField, InputSpec

SPEC = InputSpec(
    (InputField("user", ("B", 2), rows=100), InputField("candidate", ("B", "m"), rows=100)),
    {"B": (1, 8), "m": (1, 500)},
)


class Scorer:
    """Scores each candidate apart; sleeps, and fails once it is told to."""

    spec = SPEC

    def __init__(self, sleep_s: float = 0.0, factor: float = 2.0) -> None:
        self.sleep_s, self.factor, self.fails = sleep_s, factor, False

    def __call__(self, user: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        if self.sleep_s:
            time.sleep(self.sleep_s)
        if self.fails:
            raise RuntimeError("made to fail")
        return (self.factor * candidate + user.sum(1, keepdims=True)).astype(np.float32)


def scorer(**options: Any) -> Scorer:
    """For worker processes."""
    return Scorer(**options)


def request(users: int = 1, candidates: int = 3, **changes: Any) -> Request:
    inputs = {
        "user": np.arange(2 * users).reshape(users, 2) % 100,
        "candidate": np.arange(users * candidates).reshape(users, candidates) % 100,
    }
    return Request(**{"model": "ranker", "version": "", "inputs": inputs, **changes})


def expected(sent: Request, factor: float = 2.0) -> np.ndarray:
    return factor * sent.inputs["candidate"] + sent.inputs["user"].sum(1, keepdims=True)


async def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def workers(core: InferenceCore) -> list[ProcessEngine]:
    handles = [i.handle for i in core._models["ranker"]["1"].pool.instances]
    return [h for h in handles if isinstance(h, ProcessEngine)]


def entry(**options: Any) -> EntryPoint:
    return EntryPoint("test_inference_core:scorer", options)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.path.dirname(__file__)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.parametrize("kind", ["thread", "process", "inline"])
def test_requests_larger_than_a_call_and_many_at_once(kind: str) -> None:
    async def main() -> None:
        core = InferenceCore(ServingConfig(slo=SLO(60_000.0)))
        source = entry() if kind == "process" else Scorer
        info = await core.load("ranker", source, kind=kind)
        assert info.outputs == {"scores": (("B", "m"), "float32")}
        sent = [request(users) for users in (1, 3, 20, 8, 1, 1, 1)]
        answers = await asyncio.gather(*(core.infer(r) for r in sent))
        for r, answer in zip(sent, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs["scores"], expected(r))
        assert answers[2].timings.parts == 3
        await core.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_loses_no_request(how: signal.Signals) -> None:
    async def main() -> None:
        pool = Pool(engines=2, spares=1, kind="process", stall_factor=5, stall_floor_ms=100)
        queueing = Queueing(reserved_slots=0)
        core = InferenceCore(ServingConfig(slo=SLO(60_000.0), pool=pool, lanes=queueing))
        await core.load("ranker", entry(sleep_s=0.02))
        victim = workers(core)[0]
        assert victim.pid is not None
        calls = [asyncio.ensure_future(core.infer(request())) for _ in range(30)]
        await asyncio.sleep(0.03)
        os.kill(victim.pid, how)
        answers = await asyncio.gather(*calls)
        for answer in answers:
            np.testing.assert_array_equal(answer.outputs["scores"], expected(request()))
        # The spare stands in at once, and a third worker comes up behind it.
        slots = core.stats()["models"]["ranker"]["1"]["engines"]
        assert victim.name not in [s["name"] for s in slots]
        await until(lambda: core.stats()["models"]["ranker"]["1"]["pool"] == {"READY": 3})
        await core.close()

    asyncio.run(main())


def test_an_idle_worker_that_dies_is_replaced() -> None:
    async def main() -> None:
        pool = Pool(engines=1, kind="process")
        core = InferenceCore(ServingConfig(slo=SLO(60_000.0), pool=pool))
        await core.load("ranker", entry())
        victim = workers(core)[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        await until(lambda: not core.ready("ranker"))
        await until(lambda: core.ready("ranker"))
        await core.infer(request())
        await core.close()

    asyncio.run(main())


def test_the_task_that_is_cancelled_takes_its_request_out() -> None:
    async def main() -> None:
        core = InferenceCore(ServingConfig(slo=SLO(60_000.0)))
        await core.load("ranker", lambda: Scorer(sleep_s=0.03))
        first = asyncio.ensure_future(core.infer(request()))
        second = asyncio.ensure_future(core.infer(request()))
        await asyncio.sleep(0.005)
        second.cancel()
        await asyncio.sleep(0)
        assert core.stats()["models"]["ranker"]["1"]["queued"] == 0
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        await core.close()

    asyncio.run(main())


def test_drain_answers_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        core = InferenceCore(ServingConfig(slo=SLO(60_000.0)))
        await core.load("ranker", lambda: Scorer(sleep_s=0.01))
        calls = [asyncio.ensure_future(core.infer(request())) for _ in range(5)]
        await asyncio.sleep(0)
        drained = asyncio.ensure_future(core.drain())
        await asyncio.sleep(0)
        with pytest.raises(Rejected) as refused:
            await core.infer(request())
        assert refused.value.kind is Kind.NOT_READY
        assert await drained
        assert all(isinstance(c.result().outputs, dict) for c in calls)
        await core.close()

    asyncio.run(main())


# A slowdown that a busy machine does not bring about by itself.
CANARY = Canary(steps=(0.2, 1.0), window_s=0.15, min_requests=10, max_slowdown=20.0)


@pytest.mark.parametrize(
    ("new", "fails", "action"),
    [
        (Scorer(sleep_s=0.001, factor=3.0), False, "promote"),
        (Scorer(sleep_s=0.1), False, "rollback"),
        (Scorer(sleep_s=0.001), True, "rollback"),
    ],
    ids=["as fast", "slow", "failing"],
)
def test_a_release_is_promoted_or_rolled_back(new: Scorer, fails: bool, action: str) -> None:
    async def main() -> None:
        config = ServingConfig(slo=SLO(1000.0), canary=CANARY)
        core = InferenceCore(config)
        changes: list[RolloutChanged] = []

        class Log:
            def on_event(self, event: Any) -> None:
                if isinstance(event, RolloutChanged):
                    changes.append(event)

        core.subscribe(Log())
        await core.load("ranker", lambda: Scorer(sleep_s=0.001))
        rollout = await core.release("ranker", lambda: new, version="2")
        new.fails = fails  # only now: a version that fails while it warms up is never released
        end = time.monotonic() + 60
        while not rollout.done:
            assert time.monotonic() < end
            try:
                answer = await core.infer(request())
                factor = new.factor if answer.version == "2" else 2.0
                np.testing.assert_array_equal(answer.outputs["scores"], expected(request(), factor))
            except Rejected:
                assert fails
        assert changes[-1].action == action, changes
        if action == "rollback":
            assert rollout.windows <= 2
        await until(lambda: len(core.models()) == 1)
        survivor = "2" if action == "promote" else "1"
        assert (await core.infer(request())).version == survivor
        await core.close()

    asyncio.run(main())


def test_what_cannot_be_loaded_leaves_nothing_behind() -> None:
    class Broken:
        spec = SPEC

        def __call__(self, *inputs: np.ndarray) -> np.ndarray:
            raise RuntimeError("no")

    async def main() -> None:
        core = InferenceCore()
        for source, error in ((Broken, RuntimeError), (lambda: 3, DtypeError)):
            with pytest.raises(error):
                await core.load("ranker", source)
        with pytest.raises(ServingError, match="nowhere"):
            await core.load("ranker", "nowhere", kind="process")
        with pytest.raises(ArgumentError, match="EntryPoint"):
            await core.load("ranker", Scorer, kind="process")
        assert core.models() == []
        assert not core.ready()
        with pytest.raises(Rejected, match="unknown model"):
            await core.infer(request())
        await core.close()

    asyncio.run(main())


def test_weights_share_the_requests_exactly() -> None:
    async def main() -> None:
        core = InferenceCore()
        await core.load("ranker", Scorer, version="1", weight=3.0)
        await core.load("ranker", Scorer, version="2", weight=1.0)
        got = [(await core.infer(request())).version for _ in range(40)]
        assert got.count("1") == 30
        assert (await core.infer(request(version="2"))).version == "2"
        await core.unload("ranker", "1")
        assert (await core.infer(request())).version == "2"
        await core.close()

    asyncio.run(main())


def test_configuration_round_trips_and_names_what_is_wrong(tmp_path: Any) -> None:
    config = ServingConfig(slo=SLO(20.0), canary=CANARY)
    assert ServingConfig.from_dict(config.to_dict()) == config
    file = tmp_path / "server.json"
    file.write_text('{"tiers": {"gold": {"weight": 3}}, "lanes": {"policies": {"1": {}}}}')
    loaded = ServingConfig.load(file)
    assert loaded.default_tier == "gold"
    assert 1 in loaded.lanes.policies
    for text, where in (
        ('{"slo": {"latency": 3}}', "slo.latency"),
        ('{"tiers": {"gold": {"weight": -1}}}', "tier.weight"),
        ('{"pool": {"engines": 1.5}}', "pool.engines"),
        ('{"pool": {"kind": "fiber"}}', "pool.kind"),
        ('{"default_tier": "x"}', "default_tier"),
        ("[]", "configuration"),
        ("{", "server.json"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=where):
            ServingConfig.load(file)

"""The load generator: its statistics, its clock, and a real server under it."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fastrec.cli import _mount, app
from fastrec.errors import ArgumentError, ConfigError, ServingError
from fastrec.report.load_cli import _mix, _stages
from fastrec.serving.core import SLO, Request, ServingConfig, Tier, VirtualClock
from fastrec.serving.core.queues import PendingRequest
from fastrec.serving.core.request import Rejected
from fastrec.serving.core.scheduler import Scheduler
from fastrec.serving.load import (
    Bursts,
    Generator,
    LoadPlan,
    Mix,
    RequestSizes,
    Retry,
    Stage,
    TryResult,
    draw,
    find_capacity,
    summary,
)
from fastrec.serving.load.results import warnings
from fastrec.serving.load.targets import GrpcTarget, requests_of
from fastrec.serving.simulated import add_engines, signature


def plan(rate=1000.0, seconds=20.0, **options):
    return LoadPlan(stages=(Stage(seconds, rate),), **options)


# --- what is drawn


def test_poisson_arrivals_have_exponential_gaps():
    at = draw(plan(2000.0, 50.0)).at_s
    gaps = np.diff(at)
    # 100,000 gaps: the mean is within 5 of its standard errors, and so is the share beyond any
    # point of the exponential distribution.
    assert abs(gaps.mean() * 2000 - 1) < 5 / np.sqrt(len(gaps))
    for point in (0.1, 0.5, 1.0, 2.0, 4.0):
        expected = np.exp(-point)
        share = (gaps * 2000 > point).mean()
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / len(gaps))
    # No memory: one gap says nothing about the next.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / np.sqrt(len(gaps))


def test_stages_and_ramps_have_their_rates():
    made = LoadPlan(stages=(Stage(10, 1000), Stage(20, 0, 2000), Stage(5, 0), Stage(5, 400)))
    at, stage = draw(made).at_s, draw(made).stage
    for i, expected in enumerate((10_000, 20_000, 0, 2000)):
        assert abs((stage == i).sum() - expected) <= 5 * np.sqrt(expected)
    # In the middle of the ramp a quarter of its requests have come.
    assert abs(((at > 10) & (at < 20)).sum() - 5000) < 5 * np.sqrt(5000)
    even = draw(LoadPlan(stages=(Stage(2, 10), Stage(2, 20)), arrivals="uniform")).at_s
    np.testing.assert_allclose(np.diff(even)[:19], 0.1)
    np.testing.assert_allclose(np.diff(even)[20:], 0.05)


def test_bursts_keep_the_mean_and_are_bursts():
    bursts = Bursts(factor=5.0, share=0.1, length_s=0.5)
    at = draw(plan(500.0, 400.0, arrivals="bursts", bursts=bursts)).at_s
    counts = np.bincount((at / 0.25).astype(int), minlength=1600)
    # Some 80 bursts: their total length varies by an eighth, which is 5 % of the requests.
    assert abs(counts.mean() / 125 - 1) < 0.2
    # A Poisson process has a ratio of 1 here; its standard deviation over 1600 bins is 0.035.
    assert counts.var() / counts.mean() > 20
    assert np.percentile(counts, 99) > 4 * 125


def test_tiers_tenants_and_sizes_are_shared_out():
    mix = (Mix("gold", 1.0, tenants=3, skew=1.0), Mix("bulk", 3.0))
    made = plan(5000.0, 20.0, mix=mix, sizes=RequestSizes(candidates=20, tail=1.5, most=400))
    drawn = draw(made)
    assert abs((drawn.mix == 0).mean() - 0.25) < 0.01
    tenants = np.bincount(drawn.tenant[drawn.mix == 0], minlength=3)
    np.testing.assert_allclose(tenants / tenants.sum(), np.array([6, 3, 2]) / 11, atol=0.01)
    assert (drawn.tenant[drawn.mix == 1] == -1).all()
    ladder = np.array(made.sizes.ladder())
    assert ladder[0] == 20
    assert ladder[-1] == 400
    assert (np.diff(ladder) > 0).all()
    candidates = ladder[drawn.size]
    # P(more than c) = (20 / c) ** 1.5, on the ladder's steps.
    for i in range(0, len(ladder) - 1, 3):
        assert abs((candidates > ladder[i]).mean() - (20 / ladder[i]) ** 1.5) < 0.01
    again = draw(made)
    assert all(np.array_equal(getattr(drawn, f), getattr(again, f)) for f in drawn.__dict__)
    other = draw(plan(5000.0, 20.0, mix=mix, seed=1))
    assert not np.array_equal(other.at_s[:100], drawn.at_s[:100])


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"stages": []}, "stages"),
        ({"stages": [{"seconds": 0, "rate": 1}]}, "stage.seconds"),
        ({"stages": [{"seconds": 1, "rate": -1}]}, "stage.rate"),
        ({"stages": [{"seconds": 1, "rate": float("nan")}]}, "stage.rate"),
        ({"arrivals": "fractal"}, "arrivals"),
        ({"bursts": {"factor": 20.0, "share": 0.1}}, "bursts.factor"),
        ({"mix": [{"tier": "a"}, {"tier": "a"}]}, "mix"),
        ({"mix": [{"share": 0}]}, "mix.share"),
        ({"sizes": {"candidates": 60, "most": 50}}, "sizes.most"),
        ({"retry": {"tries": 0}}, "retry.tries"),
        ({"slo_ms": 0}, "slo_ms"),
        ({"rate": 5}, "rate"),
    ],
)
def test_bad_plans_are_named(values, where):
    with pytest.raises(ConfigError, match=where):
        LoadPlan.from_dict(values)


def test_plans_are_read_from_json(tmp_path):
    path = tmp_path / "plan.json"
    made = LoadPlan(stages=(Stage(1.0, 5.0, 7.0),), mix=(Mix("a", 2.0), Mix("b")), retry=Retry(3))
    clock = VirtualClock()
    generator = Generator(made, Queue(clock, 0.01), clock)
    path.write_text(json.dumps(summary(generator)["plan"]))
    assert LoadPlan.load(path) == made
    with pytest.raises(ConfigError, match="cannot be read"):
        LoadPlan.load(tmp_path / "nothing.json")
    path.write_text("{")
    with pytest.raises(ConfigError):
        LoadPlan.load(path)


# --- virtual time


class Queue:
    """One server, first come first served; down between two moments; refuses what it is told to."""

    def __init__(self, clock, service_s, down=(0.0, 0.0), refuse=lambda shot, n: None):
        self.clock, self.service_s, self.down, self.refuse = clock, service_s, down, refuse
        self.free, self.seen = 0.0, []

    def send(self, shot, done):
        self.seen.append((self.clock.now(), shot))
        refusal = self.refuse(shot, len(self.seen))
        now = self.clock.now()
        if refusal is not None:
            self.clock.call_at(now, lambda: done(refusal))
            return
        begin = max(now, self.free)
        if self.down[0] <= begin < self.down[1]:
            begin = self.down[1]
        self.free = begin + self.service_s
        self.clock.call_at(self.free, lambda: done(TryResult("ok")))


def run_virtual(made, target, clock):
    over = []
    generator = Generator(made, target, clock, lambda: over.append(clock.now()))
    generator.start()
    clock.run()
    assert len(over) == 1
    return generator


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_latencies_are_those_of_queueing_theory(load):
    """M/D/1: the mean wait is load * service / (2 (1 - load)) (Pollaczek and Khinchine)."""
    clock, service = VirtualClock(5.0), 1e-3
    generator = run_virtual(plan(load / service, 100.0), Queue(clock, service), clock)
    latency = generator.log.done_s - generator.schedule.at_s
    wait = latency.mean() - service
    expected = load * service / (2 * (1 - load))
    # Waits are correlated over some 1 / (1 - load)^2 requests, 25 of 80,000.
    assert abs(wait / expected - 1) < 0.08
    assert np.isclose(latency.min(), service)


def test_a_pause_of_the_server_is_seen_whole():
    """A closed loop would have sent one request into the pause, and called the run fine."""
    clock = VirtualClock()
    generator = run_virtual(
        plan(1000.0, 10.0, arrivals="uniform"), Queue(clock, 1e-6, down=(4.0, 5.0)), clock
    )
    result = summary(generator)
    assert result["all"]["offered"] == result["all"]["answered"] == 10_000
    # A tenth of the requests fell into the pause, and waited half a second on average.
    assert abs(result["all"]["in_slo"] - 9050) < 5
    assert abs(result["all"]["latency_ms"]["p99"] - 900) < 5
    assert abs(result["all"]["latency_ms"]["max"] - 1000) < 5
    worst = max(result["series"], key=lambda s: s["latency_ms"]["p50"])
    assert 4.0 <= worst["at_s"] < 5.0
    assert result["generator"]["kept_up"]


class LateClock(VirtualClock):
    """A machine that is busy elsewhere: from 1 s on, calls come no sooner than at 2 s."""

    def call_at(self, when, call):
        return super().call_at(2.0 if 1.0 < when < 2.0 else when, call)


def test_latency_counts_from_when_a_request_was_due_even_where_the_generator_was_late():
    clock = LateClock()
    generator = run_virtual(plan(100.0, 3.0, arrivals="uniform"), Queue(clock, 1e-6), clock)
    result = summary(generator)
    assert result["all"]["latency_ms"]["max"] > 900
    assert not result["generator"]["kept_up"]
    assert "sent late" in warnings(result)[0]


def test_clients_retry_as_they_are_told():
    clock = VirtualClock()
    first_two = Queue(
        clock, 1e-4, refuse=lambda shot, n: TryResult("overload", 0.5) if n <= 2 else None
    )
    one = plan(1.0, 1.0, arrivals="uniform", retry=Retry(3, backoff_ms=100.0))
    generator = run_virtual(one, first_two, clock)
    times = [at for at, _ in first_two.seen]
    assert len(times) == generator.log.tries[0] == 3
    assert 0.5 <= times[1] - times[0] <= 0.6
    assert 0.5 <= times[2] - times[1] <= 0.7
    # Latency is the user's: from the first try on.
    assert np.isclose(generator.log.done_s[0] - 0.5, times[2] - times[0] + 1e-4)

    for obey, tries in ((True, 1), (False, 3)):
        clock = VirtualClock()
        closed = Queue(clock, 1e-4, refuse=lambda shot, n: TryResult("overload", -1.0))
        made = plan(1.0, 1.0, arrivals="uniform", retry=Retry(3, obey=obey))
        generator = run_virtual(made, closed, clock)
        assert generator.log.tries[0] == tries
        result = summary(generator)
        assert result["all"]["refused"] == {"overload": 1}
        assert result["all"]["attainment"] == 0
        assert result["all"]["latency_ms"] is None

    clock = VirtualClock()
    wrong = Queue(clock, 1e-4, refuse=lambda shot, n: TryResult("invalid"))
    assert run_virtual(one, wrong, clock).log.tries[0] == 1


@settings(max_examples=30, deadline=None)
@given(
    rate=st.floats(0, 300),
    seconds=st.floats(0.01, 3),
    arrivals=st.sampled_from(["poisson", "bursts", "uniform"]),
    tries=st.integers(1, 3),
    refused=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_request_is_counted_once(rate, seconds, arrivals, tries, refused, seed):
    clock = VirtualClock()
    rng = np.random.default_rng(seed)
    queue = Queue(
        clock, 1e-3, refuse=lambda *_: TryResult("quota") if rng.random() < refused else None
    )
    made = plan(
        rate, seconds, arrivals=arrivals, retry=Retry(tries), mix=(Mix("a"), Mix("b")), seed=seed
    )
    generator = run_virtual(made, queue, clock)
    result = summary(generator)
    count = len(generator.schedule)
    assert len(queue.seen) == generator.log.tries.sum() >= count
    for rows in ([result["all"]], result["tiers"].values(), result["stages"], result["series"]):
        assert sum(r["offered"] for r in rows) == count
        assert sum(r["answered"] + sum(r["refused"].values()) for r in rows) == count
    json.dumps(result, allow_nan=False)


class SchedulerTarget:
    """The real scheduler, on simulated engines."""

    def __init__(self, clock, config, cost):
        self.scheduler = Scheduler("model", "1", config, clock, signature())
        add_engines(self.scheduler, clock, [cost])
        self.clock = clock

    def send(self, shot, done):
        arrays = (np.zeros((1, 1), np.int64), np.zeros((1, 50), np.int64))
        request = Request("model", "1", {}, tier=shot.tier, priority=shot.priority)

        def ended(pending):
            done(TryResult("ok" if pending.error is None else str(pending.error.kind)))

        try:
            self.scheduler.submit(PendingRequest(request, arrays, ended), arrays)
        except Rejected as refusal:
            answer = TryResult(str(refusal.kind))
            self.clock.call_at(self.clock.now(), lambda: done(answer))


def virtual_load(rate, seconds=6.0, seed=0, **options):
    """2 ms a request on one engine, goal 50 ms: C is a little below 500."""
    tiers = {"gold": Tier(weight=5.0), "silver": Tier(weight=3.0), "bulk": Tier(weight=2.0)}
    clock = VirtualClock()
    target = SchedulerTarget(
        clock, ServingConfig(SLO(50.0), tiers), lambda users, rows: 2e-3 * users
    )
    mix = tuple(Mix(tier, share) for tier, share in (("gold", 2), ("silver", 4), ("bulk", 4)))
    made = plan(rate, seconds, mix=mix, seed=seed, **options)
    return summary(run_virtual(made, target, clock))


def test_the_scheduler_keeps_its_goodput_under_overload():
    """The goals of serving, exact, on a virtual clock: what a real run adds is the machine."""

    async def probe(rate):
        return virtual_load(rate)

    capacity = asyncio.run(find_capacity(probe, start=200.0, precision=0.03))
    assert 350 <= capacity <= 500
    for factor, goal in ((2, 0.90), (5, 0.80)):
        result = virtual_load(factor * capacity)
        assert result["all"]["goodput_rps"] >= goal * capacity
        assert result["tiers"]["bulk"]["goodput_rps"] >= 0.1 * result["all"]["goodput_rps"]
    # At 2 C gold's own load is 0.4 C, inside its half.
    assert virtual_load(2 * capacity)["tiers"]["gold"]["attainment"] >= 0.99


@pytest.mark.parametrize("true", [3.0, 80.0, 1234.0])
def test_the_search_for_the_capacity(true):
    async def probe(rate):
        return {"all": {"attainment": 1.0 if rate <= true else 0.5}}

    found = asyncio.run(find_capacity(probe, start=100.0, precision=0.05))
    assert true / 1.05 <= found <= true
    assert asyncio.run(find_capacity(probe, start=1e7)) == 0.0
    assert asyncio.run(find_capacity(probe, start=1.0, most=2.0)) <= 2.0
    with pytest.raises(ArgumentError, match="start"):
        asyncio.run(find_capacity(probe, start=0.0))


# --- a real server


# So that a busy machine has no request refused.
PATIENT = ServingConfig(SLO(5000.0))


def test_a_server_over_loopback(start, engine_path):
    running = start(engine_path, PATIENT)

    async def load():
        made = plan(
            60.0, 2.0, sizes=RequestSizes(users=2, candidates=3, tail=1.0, most=9), slo_ms=5000.0
        )
        async with GrpcTarget(running.grpc, "ranker") as target:
            target.prepare(requests_of(await target.spec(), made.sizes))
            from fastrec.serving.core import LoopClock
            from fastrec.serving.load import run

            return summary(await run(made, target, LoopClock()))

    result = asyncio.run(load())
    assert result["all"]["offered"] > 60
    assert result["all"]["answered"] == result["all"]["offered"]
    assert result["all"]["latency_ms"]["p50"] > 0
    assert result["generator"]["cpu_s"] > 0


def test_refusals_have_their_reasons(start, engine_path):
    from fastrec.serving.core import LoopClock, Quota
    from fastrec.serving.load import run

    tiers = {"gold": Tier(), "poor": Tier(quota=Quota(1e-3, 1e-3))}
    server = start(engine_path, ServingConfig(SLO(5000.0), tiers))

    async def load():
        made = plan(40.0, 1.0, mix=(Mix("gold"), Mix("poor", tenants=1), Mix("none")), slo_ms=5e3)
        async with GrpcTarget(server.grpc, "ranker") as target:
            target.prepare(requests_of(await target.spec(), made.sizes))
            return summary(await run(made, target, LoopClock()))

    tiers = asyncio.run(load())["tiers"]
    assert not tiers["gold"]["refused"]
    # The first request of a tenant may overdraw a full bucket.
    assert tiers["poor"]["refused"] == {"quota": tiers["poor"]["offered"] - 1}
    assert set(tiers["none"]["refused"]) == {"invalid"}


def test_who_cannot_be_reached_is_named():
    async def load():
        async with GrpcTarget("127.0.0.1:1", "ranker", timeout_s=5.0) as target:
            await target.spec()

    with pytest.raises(ServingError, match=r"127\.0\.0\.1:1.*UNAVAILABLE"):
        asyncio.run(load())


@pytest.mark.parametrize("inside", [True, False])
def test_the_command_writes_a_report(start, engine_path, tmp_path, inside):
    if not app.registered_commands:
        _mount()
    if inside:
        (tmp_path / "config.json").write_text(json.dumps({"slo": {"latency_ms": 5000.0}}))
        arguments = ["loadtest", str(engine_path), "--config", str(tmp_path / "config.json")]
    else:
        arguments = ["loadtest", start(engine_path, PATIENT).grpc]
    arguments += ["--model", "ranker"]
    arguments += ["--profile", "20:0.5,20-60:0.5", "--candidates", "4", "--slo-ms", "5000"]
    arguments += ["--timeout-ms", "5000"]
    arguments += ["--out", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "goodput" in done.output
    assert "20 to 60 /s" in done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["all"]["answered"] == figures["all"]["offered"] > 0
    assert len(figures["stages"]) == 2
    assert figures["machine"]["cores_online"]
    page = (tmp_path / "loadtest.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<script" not in page


def test_the_command_fails_where_nothing_was_answered_and_says_why(start, engine_path, tmp_path):
    if not app.registered_commands:
        _mount()
    arguments = ["loadtest", start(engine_path, PATIENT).grpc, "--model", "ranker"]
    # One millionth of a second: every deadline has passed.
    arguments += ["--rate", "20", "--seconds", "0.5", "--candidates", "4", "--timeout-ms", "0.001"]
    report = tmp_path / "figures.json"
    done = CliRunner().invoke(app, [*arguments, "--json", str(report)])
    assert isinstance(done.exception, ServingError)
    assert "nothing was answered" in str(done.exception)
    figures = json.loads(report.read_text())
    assert figures["all"]["answered"] == 0
    assert figures["texts"]
    for kind, text in figures["texts"].items():
        assert text
        assert f"the first {kind}" in done.output


def test_the_commands_short_forms():
    assert _stages("100:10,100-400:2.5") == (Stage(10, 100), Stage(2.5, 100, 400))
    assert _mix("gold:0.2:1,bulk:0.8", 2, None) == (
        Mix("gold", 0.2, 2, priority=1),
        Mix("bulk", 0.8, 2),
    )
    for wrong in ("100", "a:b", "1:2:3"):
        with pytest.raises(ArgumentError, match="--profile"):
            _stages(wrong)
    for wrong in ("gold", "gold:x", "gold:1:2:3"):
        with pytest.raises(ArgumentError, match="--tiers"):
            _mix(wrong, 0, None)

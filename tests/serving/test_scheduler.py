"""The scheduler on a virtual clock: every run is exact, and the same each time."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fastrec.serving.core import (
    SLO,
    Admission,
    Batching,
    Kind,
    Pool,
    Queueing,
    QueuePolicy,
    Quota,
    Rejected,
    Request,
    ServingConfig,
    Tier,
    VirtualClock,
)
from fastrec.serving.core.queues import PendingRequest
from fastrec.serving.core.scheduler import Scheduler
from fastrec.serving.simulated import SimulatedEngine, add_engines, signature


def cost(users: int, rows: int) -> float:
    """0.2 ms a call, 0.3 ms a user, 10 us a row: 1 ms for a user with 50 candidates."""
    return 2e-4 + 3e-4 * users + 1e-5 * rows


class World:
    """A scheduler, its engines, and all that came out of it."""

    def __init__(
        self, config: ServingConfig, engines: int = 1, costs: Any = None, start: float = 0.0
    ) -> None:
        self.clock = VirtualClock(start)
        self.events: list[Any] = []
        self.lost: list[str] = []
        self.scheduler = Scheduler(
            "ranker",
            "1",
            config,
            self.clock,
            signature(),
            emit=self.events.append,
            on_lost=lambda slot, reason: self.lost.append(reason),
        )
        self.engines: list[SimulatedEngine] = add_engines(
            self.scheduler, self.clock, costs or [cost] * engines
        )
        self.answers: dict[int, list[PendingRequest]] = {}
        self.refused: dict[int, Rejected] = {}
        self.sent = 0

    def send(self, users: int = 1, candidates: int = 50, **fields: Any) -> PendingRequest:
        number = self.sent
        self.sent += 1
        arrays = (
            np.full((users, 1), number % 1000),
            np.arange(users * candidates).reshape(users, candidates),
        )
        request = Request("ranker", "", dict(zip(("user", "candidate"), arrays, strict=True)))
        for name, value in fields.items():
            setattr(request, name, value)
        self.answers[number] = []
        pending = PendingRequest(request, arrays, self.answers[number].append)
        try:
            self.scheduler.submit(pending, arrays)
        except Rejected as refusal:
            self.refused[number] = refusal
        return pending

    def at(self, when: float, **fields: Any) -> None:
        self.clock.call_at(when, lambda: self.send(**fields))


LOOSE = ServingConfig(slo=SLO(10_000.0), admission=Admission(enabled=False))


def test_outputs_are_the_requests_own_however_they_were_cut_and_joined() -> None:
    config = ServingConfig(
        slo=SLO(10_000.0),
        batching=Batching(max_batch_ms=2.0, pad_to=(8, 64)),
        admission=Admission(enabled=False),
    )
    # Calls cost little beside rows, so that cutting costs little, too.
    world = World(config, costs=[lambda users, rows: 2e-5 + 3e-5 * users + 1e-5 * rows] * 2)
    sizes = [(1, 5), (1, 8), (3, 6), (1, 700), (40, 50), (1, 64), (2, 63), (1, 1)]
    sent = [world.send(u, m) for u, m in sizes]
    world.clock.run()
    for number, (pending, (users, candidates)) in enumerate(zip(sent, sizes, strict=True)):
        assert pending.error is None
        expected = number * 1000 + np.arange(users * candidates).reshape(users, candidates)
        np.testing.assert_array_equal(pending.outputs["scores"], expected)
    assert sent[3].sub_count > 1
    assert sent[4].sub_count > 1
    # No call was longer than the cap allows (2 ms, a row's rounding apart).
    assert max(e.predicted_s for e in world.events if hasattr(e, "predicted_s")) <= 2.1e-3


def test_requests_share_calls_when_they_wait() -> None:
    world = World(LOOSE)
    for _ in range(9):
        world.send()
    world.clock.run()
    # The first starts at once, alone; the others wait for it and go together.
    assert [e.requests for e in world.events if hasattr(e, "requests")] == [1, 8]


def test_express_passes_the_queue_and_is_never_joined() -> None:
    config = ServingConfig(slo=SLO(100.0), lanes=Queueing(express_share=1.0, reserved_slots=0))
    world = World(config)
    for _ in range(30):
        world.send()
    fast = world.send(priority=1)
    assert fast.queue == "express"
    world.clock.run()
    # It waits for the one call that was running, of one user.
    assert fast.started - fast.arrival <= 1.1e-3
    assert [
        e.requests for e in world.events if getattr(e, "engine", "") and e.queue == "express"
    ] == [1]


def test_a_slot_is_reserved_for_express_requests() -> None:
    world = World(ServingConfig(slo=SLO(100.0)), 2)
    for _ in range(10):
        world.send()
    fast = world.send(priority=1)
    assert fast.started == world.clock.now()
    world.clock.run()
    assert not world.refused


def test_the_earliest_deadline_goes_first() -> None:
    config = ServingConfig(
        slo=SLO(1000.0), batching=Batching(enabled=False), admission=Admission(enabled=False)
    )
    world = World(config)
    world.send()
    later = [world.send(deadline=d) for d in (0.9, 0.3, 0.6, 0.1)]
    world.clock.run()
    order = sorted(later, key=lambda t: t.started)
    assert [t.request.deadline for t in order] == [0.1, 0.3, 0.6, 0.9]


def test_what_cannot_be_done_in_time_is_refused_at_once() -> None:
    world = World(ServingConfig(slo=SLO(50.0)))
    world.send(users=20)
    world.send(deadline=0.002)
    assert world.refused[1].kind is Kind.DEADLINE_INFEASIBLE
    assert str(world.refused[1]) == "Request timeout expired"
    world.send(deadline=0.0)
    assert world.refused[2].kind is Kind.EXPIRED


def test_expired_and_cancelled_requests_leave_at_once() -> None:
    config = ServingConfig(
        slo=SLO(1000.0),
        batching=Batching(enabled=False, max_users=1000, max_rows=100_000, max_batch_ms=500.0),
        admission=Admission(check_deadlines=False),
    )
    world = World(config)
    world.send(users=300)  # some 240 ms
    late = world.send(deadline=0.010)
    unwanted = world.send()
    assert world.scheduler.queues.count == 2
    world.scheduler.cancel(unwanted)
    assert unwanted.error is not None
    assert unwanted.error.kind is Kind.CANCELLED
    assert world.scheduler.queues.count == 1
    world.clock.run(0.0101)
    assert late.error is not None
    assert late.error.kind is Kind.EXPIRED
    assert world.scheduler.queues.count == 0
    assert world.scheduler.queues.bytes == 0
    world.clock.run()
    assert world.engines[0].calls == 1


def test_quota_is_conserved_and_says_when_to_come_back() -> None:
    # 10 ms of engine time a second, and 5 ms saved up: 5 requests of 1 ms, then one each 100 ms.
    tiers = {"free": Tier(quota=Quota(10_000, 5_000))}
    world = World(ServingConfig(slo=SLO(100.0), tiers=tiers))
    for i in range(400):
        world.at(i * 0.005, tenant="a")
    world.at(0.001, tenant="b")
    world.clock.run(2.0)
    granted = world.sent - len(world.refused)
    assert {r.kind for r in world.refused.values()} == {Kind.QUOTA}
    # 2 s at one each 100 ms, the bucket, and the other tenant's one.
    assert 24 <= granted <= 27
    waits = [r.retry_after_s for r in world.refused.values()]
    assert all(w is not None and 0 < w <= 0.101 for w in waits)


def overload(config: ServingConfig, rates: dict[str, float], seconds: float = 2.0) -> World:
    world = World(config)
    rng = np.random.default_rng(0)
    for tier, rate in rates.items():
        for when in np.cumsum(rng.exponential(1 / rate, int(rate * seconds))):
            world.at(float(when), tier=tier)
    world.clock.run(seconds + 1)
    return world


def test_overload_is_shared_by_weight_and_nothing_starves() -> None:
    tiers = {"gold": Tier(6), "silver": Tier(3), "bulk": Tier(1)}
    config = ServingConfig(slo=SLO(20.0), tiers=tiers)
    world = overload(config, {"gold": 3000, "silver": 3000, "bulk": 3000})
    served = world.scheduler.served_s
    total = sum(served.values())
    for name, tier in tiers.items():
        assert abs(served[name] / total - tier.weight / 10) < 0.05, (name, served)
    done = [t for got in world.answers.values() for t in got if t.error is None]
    in_time = [e for e in world.events if getattr(e, "outcome", "") == "ok" and e.total_s <= 0.02]
    assert len(in_time) >= 0.98 * len(done)


def test_a_tier_within_its_share_does_not_feel_the_overload_of_others() -> None:
    tiers = {"gold": Tier(5), "bulk": Tier(5)}
    world = overload(ServingConfig(slo=SLO(20.0), tiers=tiers), {"gold": 300, "bulk": 4000})
    gold = [e for e in world.events if getattr(e, "outcome", "") and e.tier == "gold"]
    good = [e for e in gold if e.outcome == "ok" and e.total_s <= 0.02]
    assert len(good) >= 0.99 * len(gold)


def test_large_requests_that_can_be_in_time_are_let_in() -> None:
    """The limit counts what is in flight, not what comes: four requests of 10 ms are done in 40."""
    tiers = {"gold": Tier(5), "bulk": Tier(5)}
    world = World(ServingConfig(slo=SLO(50.0), tiers=tiers), costs=[lambda users, rows: 0.010])
    sent = [world.send(tier="bulk") for _ in range(4)]
    world.clock.run()
    assert [t.error for t in sent] == [None] * 4
    done = [e for e in world.events if getattr(e, "outcome", "") == "ok"]
    assert max(e.total_s for e in done) <= 0.05


def test_what_is_turned_away_early_is_what_submit_refuses() -> None:
    """The wire asks before it decodes: the answer is that of submit, and nothing is charged."""
    tiers = {"gold": Tier(6), "bulk": Tier(4, quota=Quota(2e5, 2e4)), "express": Tier(1)}
    world = World(ServingConfig(slo=SLO(20.0), tiers=tiers))
    scheduler, admission = world.scheduler, world.scheduler.admission
    rng = np.random.default_rng(0)
    told: list[tuple[str, str]] = []

    def arrive() -> None:
        fields = {"tier": str(rng.choice(list(tiers))), "tenant": "a", "priority": 0}
        fields["priority"] = int(fields["tier"] == "express")
        before = admission.in_flight_s, scheduler.queues.count, len(scheduler.open)
        try:
            scheduler.turn_away(Request("ranker", "", {}, **fields), (1, 50))
            early = ""
        except Rejected as refusal:
            early = str(refusal.kind)
        assert (admission.in_flight_s, scheduler.queues.count, len(scheduler.open)) == before
        pending = world.send(**fields)
        told.append((early, "" if pending.error is None else str(pending.error.kind)))

    for when in np.cumsum(rng.exponential(1 / 4000, 4000)):
        world.clock.call_at(float(when), arrive)
    world.clock.run()
    assert all(early == late for early, late in told)
    assert {"", "quota", "overload", "deadline_infeasible"} <= {early for early, _ in told}


def test_the_early_look_lasts_as_long_as_the_overload() -> None:
    world = World(ServingConfig(slo=SLO(20.0)))
    scheduler = world.scheduler
    assert not scheduler.shedding()
    while not world.refused:
        world.send()
    assert scheduler.shedding()
    world.clock.run()
    # An engine is idle: the next request is let in, whatever was before.
    assert not scheduler.shedding()
    world.clock.run(1.0)
    world.send()
    assert not scheduler.shedding()  # it is busy, and nothing was refused lately
    world.clock.run()


def test_a_full_queue_is_refused_with_tritons_text() -> None:
    queueing = Queueing(policies={2: QueuePolicy(max_queue_size=3)}, express_priorities=())
    world = World(ServingConfig(slo=SLO(1000.0), lanes=queueing))
    for _ in range(6):
        world.send()
    # One runs, three wait.
    assert [r.kind for r in world.refused.values()] == [Kind.QUEUE_FULL] * 2
    assert str(world.refused[4]) == "Exceeds maximum queue size"
    world.clock.run()


# A monotonic clock counts from when the machine was started: months ago, it may be.
@pytest.mark.parametrize("start", [0.0, 1e7])
def test_triton_timeout_policies(start: float) -> None:
    policies = {
        1: QueuePolicy(default_timeout_us=1000, timeout_action="DELAY"),
        2: QueuePolicy(default_timeout_us=1000, allow_timeout_override=False),
    }
    queueing = Queueing(policies=policies, express_priorities=())
    config = ServingConfig(
        slo=SLO(1000.0),
        lanes=queueing,
        batching=Batching(enabled=False),
        admission=Admission(check_deadlines=False),
    )
    world = World(config, start=start)
    world.send(users=30)  # more than 20 ms
    delayed = world.send(priority=1)
    rejected = world.send(priority=2, deadline=start + 100.0)
    last = world.send(priority=3)
    world.clock.run()
    assert rejected.error is not None
    assert rejected.error.kind is Kind.EXPIRED
    assert delayed.error is None
    assert delayed.started > last.started


def test_an_engine_that_dies_loses_no_request() -> None:
    world = World(ServingConfig(slo=SLO(100.0), lanes=Queueing(reserved_slots=0)), 2)
    for _ in range(20):
        world.send()
    world.clock.call_at(0.0005, world.engines[0].die)
    world.clock.run()
    assert world.lost == ["died"]
    assert all(t.error is None for got in world.answers.values() for t in got)
    assert sum(len(got) for got in world.answers.values()) == 20
    assert max(t.tries for got in world.answers.values() for t in got) == 2


@pytest.mark.parametrize("users", [1, 30])
def test_a_request_whose_last_engine_died_expires(users: int) -> None:
    world = World(ServingConfig(slo=SLO(1000.0)), 1)
    sent = world.send(users=users, deadline=0.5)
    world.clock.call_at(0.0005, world.engines[0].die)
    world.clock.run(0.4)
    assert world.lost == ["died"]
    assert sent.error is None
    world.clock.run(0.501)
    assert sent.error is not None
    assert sent.error.kind is Kind.EXPIRED
    assert world.scheduler.queues.count == 0
    assert not world.scheduler.open


def test_an_engine_that_hangs_is_found_and_its_requests_run_elsewhere() -> None:
    pool = Pool(stall_factor=10, stall_floor_ms=20)
    config = ServingConfig(slo=SLO(200.0), pool=pool, lanes=Queueing(reserved_slots=0))
    world = World(config, 2)
    world.engines[0].hangs = True
    sent = [world.send() for _ in range(10)]
    world.clock.run(0.2)
    assert world.lost == ["stalled"]
    assert all(t.error is None and t.tries <= 2 for t in sent)


def test_one_bad_request_does_not_take_its_neighbours_along() -> None:
    world = World(LOOSE)
    world.engines[0].fails = lambda arrays: bool((arrays[0] == 4).any())
    sent = [world.send() for _ in range(9)]
    world.clock.run()
    failed = [i for i, t in enumerate(sent) if t.error is not None]
    assert failed == [4]
    error = sent[4].error
    assert error is not None
    assert error.kind is Kind.INTERNAL


def test_a_slow_engine_is_taken_out_and_comes_back() -> None:
    slow = 1.0

    def varying(users: int, rows: int) -> float:
        return cost(users, rows) * slow

    config = ServingConfig(slo=SLO(100.0), batching=Batching(enabled=False))
    world = World(config, costs=[varying, cost, cost, cost])
    for i in range(4000):
        world.at(i * 0.0005)

    def set_slow() -> None:
        nonlocal slow
        slow = 20.0

    world.clock.call_at(0.05, set_slow)
    world.clock.run(3.0)
    assert "slow" in world.lost
    assert len(world.refused) < 40


def test_work_goes_to_the_engine_that_is_done_first() -> None:
    def three(users: int, rows: int) -> float:
        return 3 * cost(users, rows)

    queueing = Queueing(express_priorities=())
    world = World(ServingConfig(slo=SLO(200.0), lanes=queueing), costs=[three, cost])
    rng = np.random.default_rng(1)
    for when in np.cumsum(rng.exponential(1 / 300, 600)):
        world.at(float(when))
    world.clock.run()
    assert world.engines[1].calls > 2 * world.engines[0].calls
    times = [e.total_s for e in world.events if getattr(e, "outcome", "") == "ok"]
    # The oracle at this load is the fast engine alone or the slow one when that is behind.
    assert np.percentile(times, 99) < 0.006


@st.composite
def story(draw: st.DrawFn) -> list[tuple[str, float, dict[str, Any]]]:
    steps = []
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(["send"] * 8 + ["cancel", "die", "hang", "fail"]))
        when = draw(st.floats(0, 0.05))
        fields = {
            "users": draw(st.integers(1, 12)),
            "candidates": draw(st.sampled_from([1, 7, 50, 400])),
            "tier": draw(st.sampled_from(["gold", "bulk", ""])),
            "priority": draw(st.integers(0, 5)),
            "tenant": draw(st.sampled_from(["a", "b"])),
            "deadline": draw(st.one_of(st.none(), st.floats(0, 0.2))),
        }
        steps.append((kind, when, fields))
    return steps


@settings(max_examples=60, deadline=None)
@given(story(), st.integers(1, 3), st.booleans())
def test_nothing_is_lost_and_everything_is_answered_once(
    steps: list[tuple[str, float, dict[str, Any]]], engines: int, delay: bool
) -> None:
    config = ServingConfig(
        slo=SLO(50.0),
        tiers={"gold": Tier(3), "bulk": Tier(1, quota=Quota(200_000, 20_000))},
        batching=Batching(pad_to=(8, 64), max_delay_ms=2.0 if delay else 0.0),
        pool=Pool(stall_factor=5, stall_floor_ms=30),
    )
    world = World(config, engines)
    sent: list[PendingRequest] = []
    for i, (kind, when, fields) in enumerate(steps):
        if kind == "send":
            world.clock.call_at(when, lambda f=fields: sent.append(world.send(**f)))
        elif kind == "cancel":
            world.clock.call_at(
                when,
                lambda i=i: sent and world.scheduler.cancel(sent[i % len(sent)]),
            )
        else:
            engine = world.engines[i % engines]
            name = {"hang": "hangs", "fail": "fails"}.get(kind)
            change = (
                engine.die
                if name is None
                else (
                    lambda e=engine, n=name: setattr(e, n, True if n == "hangs" else lambda a: True)
                )
            )
            world.clock.call_at(when, change)
    # A replacement, as the pool would bring it.
    world.clock.call_at(0.1, lambda: add_engines(world.scheduler, world.clock, [cost], name="new"))
    world.clock.run(30.0)
    scheduler = world.scheduler
    for number, got in world.answers.items():
        assert len(got) == (0 if number in world.refused else 1)
    outcomes = [e for e in world.events if getattr(e, "outcome", "")]
    assert len(outcomes) == world.sent
    assert not scheduler.open
    assert scheduler.queues.count == scheduler.queues.bytes == 0
    assert scheduler.admission.in_flight_s == 0
    assert not any(scheduler.queues.by_priority.values())
    for pending in sent:
        if pending.error is None:
            number = int(pending.request.inputs["user"][0, 0])
            expected = number * 1000 + pending.request.inputs["candidate"]
            np.testing.assert_array_equal(pending.outputs["scores"], expected)


@pytest.mark.parametrize("seed", range(3))
def test_aged_requests_are_next(seed: int) -> None:
    """A request with a far deadline under a stream of near ones that fills the engine."""
    config = ServingConfig(
        slo=SLO(20.0),
        lanes=Queueing(age_ms=50.0, express_priorities=()),
        batching=Batching(enabled=False),
        admission=Admission(enabled=False),
    )
    world = World(config)
    rng = np.random.default_rng(seed)
    for when in np.cumsum(rng.exponential(1e-3, 400)):
        world.at(float(when), deadline=float(when) + 0.02)
    patient = world.send(deadline=1000.0)
    patient_too = world.send(deadline=1000.0)
    world.clock.run(0.5)
    assert patient.error is None
    assert patient_too.started - patient_too.arrival < 0.15


def encoder(fixed_s: float, row_s: float = 1e-4):
    """Seconds of an engine that encodes a history for each user of each call."""
    return lambda users, rows: fixed_s * users + row_s * rows


@pytest.mark.parametrize("fixed_ms", [5, 9, 12, 20, 72])
def test_a_lone_request_on_an_idle_server_is_answered_in_one_call(fixed_ms: int) -> None:
    world = World(ServingConfig(slo=SLO(50.0)), costs=[encoder(fixed_ms / 1e3)])
    for i in range(20):
        world.at(i * 0.3, candidates=50)
    world.clock.run()
    assert not world.refused
    assert [pending.sub_count for (pending,) in world.answers.values()] == [1] * 20
    assert all(pending.error is None for (pending,) in world.answers.values())


def test_a_timeout_of_the_requests_own_that_cannot_be_met_is_refused() -> None:
    world = World(ServingConfig(slo=SLO(50.0)), costs=[encoder(0.03)])
    world.send(deadline=0.02)
    assert world.refused[0].kind is Kind.DEADLINE_INFEASIBLE
    assert str(world.refused[0]) == "Request timeout expired"
    world.send()  # runs, as the server is idle
    world.send()  # would wait for it
    assert list(world.refused) == [0, 2]
    assert "50 ms, the limit of tier 'default'" in str(world.refused[2])
    world.clock.run()
    assert world.answers[1][0].error is None


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.floats(0, 0.02), st.floats(0, 0.05), st.floats(1e-6, 1e-3)),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 512),  # 8 x 512 rows are the most that one call takes
)
def test_requests_are_cut_only_where_that_is_cheap_or_the_pieces_finish_sooner(
    costs: tuple[float, float, float], engines: int, users: int, candidates: int
) -> None:
    call_s, user_s, row_s = costs

    def line(users: int, rows: int) -> float:
        return call_s + user_s * users + row_s * rows

    config = ServingConfig(slo=SLO(50.0), lanes=Queueing(reserved_slots=0))
    world = World(config, costs=[line] * engines)
    pending = world.send(users=users, candidates=candidates)
    assert not world.refused
    model = world.scheduler.router.model
    pieces = [
        model.predict(sub.users, sub.users * sub.candidates)
        for chunk in pending.subs
        for sub in chunk
    ]
    whole_s = model.predict(users, users * candidates)
    rounds = -(-len(pieces) // engines)
    assert (
        len(pieces) <= 1
        or rounds * max(pieces) <= whole_s * 1.001
        or len(pieces) * max(pieces) <= 1.101 * whole_s
    )
    world.clock.run()
    assert pending.error is None


def test_cutting_makes_no_request_late_that_is_in_time_in_one_call() -> None:
    costs = (0.0009, 0.0078, 0.0004)
    world = World(
        ServingConfig(slo=SLO(50.0)),
        costs=[lambda users, rows: costs[0] + costs[1] * users + costs[2] * rows],
    )
    # 47.9 ms in one call, 51.4 in five.
    pending = world.send(users=5, candidates=4, deadline=0.05)
    world.clock.run()
    assert pending.error is None
    assert pending.sub_count == 1

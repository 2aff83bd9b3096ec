"""Fleet simulation: against queueing theory, against the real core, and as a command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from typer.testing import CliRunner

from fastrec.errors import ArgumentError, ArtifactError
from fastrec.serving.core import SLO, Admission, Batching, Queueing, ServingConfig, Tier
from fastrec.serving.simulate import EngineProfile, Fleet, Outcome, simulate
from fastrec.serving.simulate.check import check

MS = EngineProfile(1e-4, 4e-4, 1e-5)  # 1 ms for a user with 50 candidates
PLAIN = ServingConfig(
    slo=SLO(1e6),
    batching=Batching(enabled=False),
    admission=Admission(enabled=False),
    lanes=Queueing(express_priorities=()),
)


def one_host(engines: int = 1, **fields: Any) -> Fleet:
    settings: dict[str, Any] = {
        "engines": engines,
        "host_engines": engines,
        "cell_hosts": 1,
        "callers": 1,
        "policy": "random",
        "round_trip_us": 0.0,
        **fields,
    }
    return Fleet(**settings)


def busy(outcome: Outcome) -> float:
    return float(np.mean(outcome.utilisation))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_engine_is_an_m_d_1_queue(load: float) -> None:
    """P(wait = 0) = 1 - load, and the median of M/D/1 follows from Erlang's formula:
    P(W <= t) = (1 - load) e^(load t / s) for t < s."""
    (out,) = simulate(one_host(rate=1000 * load, seconds=30.0, seed=1), MS, PLAIN)
    assert out.outcomes == {"ok": out.offered}
    # Three standard errors of a Poisson count, and of a share.
    assert abs(out.offered - 30_000 * load) < 3 * np.sqrt(30_000 * load)
    assert abs(busy(out) - load) < 3 * np.sqrt(load / 30_000) + 0.005
    q = 1 - load + (np.exp(load / 2) - 1) * (1 - load)
    # Half a service time of waiting: 1.5 ms in all. Waits are correlated, hence the wide margin.
    assert out.latency.percentile_ms(100 * q) == pytest.approx(1.5, rel=0.1)


def test_a_stream_dealt_at_random_is_as_good_as_its_parts() -> None:
    """Four cells of one engine behave as one engine with a quarter of the stream."""
    alone = simulate(one_host(rate=500.0, seconds=20.0, seed=2), MS, PLAIN)
    fleet = Fleet(
        engines=4, host_engines=1, cell_hosts=1, cells=2, callers=3, policy="round_robin",
        round_trip_us=0.0, rate=2000.0, seconds=20.0, seed=3,
    )  # fmt: skip
    assert fleet.sampled == 0.5
    assert "50.0%" in fleet.statement()
    together = Outcome.joined(simulate(fleet, MS, PLAIN))
    assert together.offered == pytest.approx(20_000, rel=0.03)
    for q in (50, 90):
        got, expected = together.latency.percentile_ms(q), alone[0].latency.percentile_ms(q)
        assert got == pytest.approx(expected, rel=0.1)


def test_the_same_seed_is_the_same_run() -> None:
    fleet = Fleet(engines=40, host_engines=2, cell_hosts=10, rate=20_000.0, seconds=0.1, callers=4)
    first, second = (simulate(fleet, MS)[0].to_dict() for _ in range(2))
    assert first == second


def test_probes_beat_chance_where_some_hosts_are_slow() -> None:
    p99 = {}
    for policy in ("probes", "random"):
        fleet = Fleet(
            engines=40, host_engines=4, cell_hosts=10, callers=10, policy=policy, rate=26_000.0,
            seconds=0.4, warm_s=0.2, slow_share=0.2, slow_factor=2.0,
        )  # fmt: skip
        (out,) = simulate(fleet, MS, ServingConfig(slo=SLO(50.0)))
        assert sum(out.outcomes.values()) == out.offered
        p99[policy] = out.latency.percentile_ms(99)
    assert p99["probes"] < 0.7 * p99["random"], p99


def test_a_door_that_takes_time_bounds_what_a_host_answers() -> None:
    # 1,000 requests a second go through a handler of 1 ms; twice as many come.
    fleet = one_host(4, rate=2000.0, seconds=0.5, warm_s=0.0, event_loop_us=1000.0)
    (out,) = simulate(fleet, MS, PLAIN)
    assert out.offered == pytest.approx(1000, rel=0.15)
    assert out.latency.percentile_ms(99) > 400


def test_tiers_are_told_apart() -> None:
    config = ServingConfig(slo=SLO(20.0), tiers={"gold": Tier(9), "bulk": Tier(1)})
    fleet = one_host(2, rate=6000.0, seconds=0.5, tiers={"gold": 0.2, "bulk": 0.8})
    (out,) = simulate(fleet, MS, config)
    assert set(out.tiers) == {"gold", "bulk"}
    with pytest.raises(ArgumentError, match="tiers"):
        simulate(one_host(tiers={"lead": 1.0}), MS, config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"engines": 0},
        {"engines": 1001},
        {"cells": 30},
        {"rate": 0.0},
        {"policy": "luck"},
        {"candidates": {}},
        {"candidates": {0: 1.0}},
        {"tiers": {"gold": 0.0}},
        {"slow_share": 1.5},
        {"round_trip_us": -1.0},
    ],
)
def test_what_is_no_fleet_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Fleet(**{"engines": 1000, **wrong})


def test_the_real_runtime_does_the_same() -> None:
    """Sleeping engines of 10 ms, so that Python's own microseconds are few against it."""
    slow = EngineProfile(1e-3, 4e-3, 1e-4)
    # On a busy machine the guard would refuse some of the real ones.
    told = check(one_host(2, rate=100.0, seconds=1.5, warm_s=0.2, seed=5), slow, PLAIN)
    assert set(told["real"]["outcomes"]) == {"ok"} == set(told["simulated"]["outcomes"])
    # A busy machine wakes sleepers late, never early.
    assert told["real"]["p50_ms"] > 0.8 * told["simulated"]["p50_ms"]


class Slept:
    """An engine of a known time."""

    spec = None

    def __init__(self) -> None:
        from fastrec.spec import InputField, InputSpec

        self.spec = InputSpec((InputField("c", ("B", "m"), rows=5),))

    def __call__(self, c: np.ndarray) -> np.ndarray:
        import time

        time.sleep(1e-3 * len(c))
        return c


def test_profiles_are_measured_and_kept(tmp_path: Path) -> None:
    profile = EngineProfile.measure(Slept(), users=(1, 4), candidates=(10, 20), calls=5)
    assert 1e-3 < profile.line(1, 10) < 20e-3
    assert profile.line(4, 80) > profile.line(1, 10)
    assert len(profile.scatter) == 201
    profile.save(tmp_path / "p.json")
    assert EngineProfile.load(tmp_path / "p.json") == profile
    for bad in ("", "[]", "{}", '{"call_s": -1, "user_s": 0, "row_s": 0, "scatter": [1]}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ArtifactError):
            EngineProfile.load(tmp_path / "bad.json")


@given(st.lists(st.floats(0.5, 3.0), min_size=1, max_size=9).map(sorted))
def test_draws_stay_within_what_was_measured(scatter: list[float]) -> None:
    profile = EngineProfile(1e-3, 0.0, 0.0, tuple(scatter))
    draw = profile.sampler(random.Random(0))
    draws = [draw(1, 50) for _ in range(300)]
    assert min(draws) >= 1e-3 * scatter[0] - 1e-12
    assert max(draws) <= 1e-3 * scatter[-1] + 1e-12
    assert scatter[0] - 1e-9 <= profile.mean_scatter() <= scatter[-1] + 1e-9


def test_the_command_reports(tmp_path: Path) -> None:
    from fastrec.cli import _mount, app

    pytest.importorskip("matplotlib", reason="fastrec-kernels[report] is not installed")
    if not app.registered_commands:
        _mount()
    MS.save(tmp_path / "profile.json")
    command = ["simulate", "--profile", str(tmp_path / "profile.json"), "--engines", "40"]
    command += ["--host-engines", "2", "--cell-hosts", "5", "--load", "0.3", "--load", "0.6"]
    command += ["--policy", "probes", "--policy", "random", "--seconds", "0.05"]
    command += ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(r["policy"], r["rate"]) for r in report["rows"]] == [
        ("probes", 12_000.0), ("random", 12_000.0), ("probes", 24_000.0), ("random", 24_000.0)
    ]  # fmt: skip
    assert "25.0%" in report["statement"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

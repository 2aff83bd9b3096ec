"""Prequal's rule on its own: which host, of what the probes said."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastrec.errors import ConfigError
from fastrec.serving.core.probes import ProbePool, Probing

STILL = Probing(removed=0.0, delta=1e9)  # answers are used for ever


def pool(hosts: int = 4, probing: Probing = STILL) -> ProbePool[str]:
    return ProbePool([f"h{i}" for i in range(hosts)], probing, random.Random(0))


def test_among_cold_hosts_the_least_latency_wins() -> None:
    made = pool()
    for host, in_flight, latency in (("h0", 1, 0.03), ("h1", 2, 0.01), ("h2", 3, 0.02)):
        made.add(host, in_flight, latency, 0.0)
    made.add("h3", 90, 0.001, 0.0)  # hot: above the quantile of what was seen
    assert made.pick(0.0) == "h1"


def test_where_all_are_hot_the_fewest_requests_win() -> None:
    made = pool()
    for _ in range(200):
        made.add("h0", 1, 0.001, 0.0)
    made.drop("h0")
    for host, in_flight, latency in (("h1", 50, 0.01), ("h2", 20, 0.09), ("h3", 30, 0.02)):
        made.add(host, in_flight, latency, 0.0)
    assert made.pick(0.0) == "h2"


def test_requests_sent_since_the_probe_count() -> None:
    made = pool(2, Probing(removed=0.0, delta=1e9, hot_quantile=0.0))
    made.add("h0", 0, 0.01, 0.0)
    made.add("h1", 2, 0.01, 0.0)
    # One answer tells of a host; what was sent there meanwhile is added to it.
    assert [made.pick(0.0) for _ in range(6)].count("h0") == 4


def test_requests_sent_since_make_a_host_later() -> None:
    made = pool(2, Probing(removed=0.0, delta=1e9, hot_quantile=1.0))
    made.add("h0", 0, 0.010, 0.0, each_s=0.004)
    made.add("h1", 0, 0.015, 0.0, each_s=0.004)
    assert [made.pick(0.0) for _ in range(4)] == ["h0", "h0", "h1", "h0"]


def test_old_answers_are_not_used() -> None:
    made = pool(3)
    made.add("h0", 0, 0.01, 0.0)
    made.add("h1", 0, 0.02, 0.0)
    assert made.fresh(1.0)
    assert not made.fresh(1.1)
    assert {made.pick(1.1) for _ in range(60)} == {"h0", "h1", "h2"}
    assert len(made) == 0


def test_answers_wear_out_and_some_are_thrown_away() -> None:
    made = pool(100, Probing(pool=16))
    for i in range(30):
        made.add(f"h{i}", i, 0.01, 0.0)
    assert len(made) == 16
    before = len(made)
    for _ in range(5):
        made.pick(0.0)
    assert len(made) < before


def test_unusable_hosts_are_passed_over() -> None:
    made = pool(3)
    for i in range(3):
        made.add(f"h{i}", 0, 0.01 * (i + 1), 0.0)
    assert made.pick(0.0, lambda host: host != "h0") == "h1"
    # All of them: better one that may be back than none.
    assert made.pick(0.0, lambda host: False) in made.hosts


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0, 2.5, 9.0])
def test_probes_are_sent_at_the_rate_and_never_twice_to_a_host(rate: float) -> None:
    made = pool(4, Probing(per_request=rate))
    sent = [made.targets() for _ in range(400)]
    assert all(len(set(hosts)) == len(hosts) for hosts in sent)
    assert sum(map(len, sent)) == int(400 * min(rate, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_request": -1.0},
        {"pool": 1},
        {"max_age_s": 0.0},
        {"timeout_s": float("nan")},
        {"hot_quantile": 1.5},
        {"removed": -0.1},
        {"delta": -1.0},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Probing(**wrong)  # type: ignore[arg-type]


def test_hosts_may_come_and_go() -> None:
    made = pool(3)
    for i in range(3):
        made.add(f"h{i}", i, 0.01, 0.0)
    made.set_hosts(made.hosts[1:])
    assert len(made) == 2
    assert made.pick(0.0) != "h0"
    with pytest.raises(ConfigError, match="hosts"):
        made.set_hosts([])


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 50), st.floats(0, 1)), max_size=60),
    st.sampled_from([Probing(), STILL, Probing(hot_quantile=0.0), Probing(hot_quantile=1.0)]),
)
def test_any_news_leads_to_a_host(
    hosts: int, news: list[tuple[int, int, float]], probing: Probing
) -> None:
    made = pool(hosts, probing)
    for step, (host, in_flight, latency) in enumerate(news):
        if host < hosts:
            made.add(made.hosts[host], in_flight, latency, step / 50)
        assert made.pick(step / 50) in made.hosts
        assert set(made.targets()) <= set(made.hosts)
        assert len(made) <= probing.pool

"""The measuring core: fair turns, honest statistics, a gate that closes."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from fastrec.errors import ArgumentError, BackendError, ShapeError
from fastrec.measure.memory import peak_rss_mb, run_child
from fastrec.measure.timing import (
    SETTLE_S,
    Samples,
    Tolerance,
    correctness_gate,
    interleaved,
    measured_spin_s,
    ratio,
)


class World:
    """A clock that only engines and pauses move, and a log of what happened."""

    def __init__(self) -> None:
        self.now, self.log = 0, []

    def clock(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append(("sleep", seconds))
        self.now += int(seconds * 1e9)

    def engine(self, name: str, ns: int, spin_s: float | None = None):
        def call(x: int) -> None:
            self.log.append((name, x))
            self.now += ns + x

        if spin_s is not None:
            call.spin_s = spin_s
        return call


def test_each_round_gives_every_engine_the_same_inputs_in_a_changing_order():
    world = World()
    engines = {name: world.engine(name, ns) for name, ns in (("a", 1000), ("b", 3000), ("c", 500))}
    taken = interleaved(
        engines,
        [(0,), (1,), (2,)],
        rounds=12,
        calls=2,
        warmup=1,
        settle_s=0.0,
        clock=world.clock,
        sleep=world.sleep,
    )
    # Call j of round r takes input (2 r + j) % 3, which adds that many nanoseconds.
    inputs = np.arange(24).reshape(12, 2) % 3
    for name, base in (("a", 1000), ("b", 3000), ("c", 500)):
        assert taken[name].ns.dtype == np.int64
        np.testing.assert_array_equal(taken[name].ns, base + inputs)
    turns = [log for log in world.log if log[0] != "sleep"][3:]
    # A turn is one settling call and two counted ones.
    order = [tuple(name for name, _ in turns[9 * r : 9 * r + 9 : 3]) for r in range(12)]
    assert all(sorted(names) == ["a", "b", "c"] for names in order)
    assert len(set(order)) > 1
    assert len(turns) == 12 * 3 * 3


def test_the_pause_before_a_turn_is_as_long_as_the_previous_engine_spins():
    world = World()
    engines = {"spins": world.engine("spins", 10, 0.02), "silent": world.engine("silent", 10)}
    interleaved(engines, [(0,)], rounds=4, calls=1, warmup=1, clock=world.clock, sleep=world.sleep)
    previous = None
    for entry in world.log:
        if entry[0] == "sleep":
            assert entry[1] == {"spins": 0.02, "silent": SETTLE_S}[previous]
        else:
            previous = entry[0]
    assert any(entry == ("sleep", 0.02) for entry in world.log)


def test_a_turn_begins_with_uncounted_calls_until_the_engine_is_awake():
    world = World()
    engines = {"quick": world.engine("quick", 1_000_000), "slow": world.engine("slow", 50_000_000)}
    taken = interleaved(
        engines,
        [(0,)],
        rounds=2,
        calls={"quick": 5, "slow": 1},
        warmup=0,
        warm_s={"quick": 0.003, "slow": None},
        settle_s=0.0,
        clock=world.clock,
        sleep=world.sleep,
    )
    assert taken["quick"].ns.shape == (2, 5)
    assert taken["slow"].ns.shape == (2, 1)
    names = [name for name, _ in world.log]
    assert names.count("quick") == 2 * (3 + 5)  # 3 ms of calls of 1 ms, then the counted ones
    assert names.count("slow") == 2 * 1
    with pytest.raises(ArgumentError, match=r"a count for each of \['quick', 'slow'\]"):
        interleaved(engines, [(0,)], calls={"quick": 1})


def test_a_call_whose_threads_spin_on_is_told_from_one_that_is_over():
    def spins():
        end = time.perf_counter() + 0.02

        def burn():
            while time.perf_counter() < end:
                pass

        threading.Thread(target=burn).start()

    # What else this process does meanwhile counts too, so only the difference is sure.
    assert measured_spin_s(lambda: None) < measured_spin_s(spins) <= 0.06


def test_a_budget_ends_after_a_whole_round():
    world = World()
    engines = {"a": world.engine("a", 10**8), "b": world.engine("b", 10**8)}
    taken = interleaved(
        engines,
        [(0,)],
        rounds=1000,
        calls=4,
        warmup=0,
        settle_s=0.0,
        seconds_budget=2.5,
        clock=world.clock,
        sleep=world.sleep,
    )
    # A round is 2 engines x 5 calls x 0.1 s = 1 s: the third passes 2.5 s.
    assert taken["a"].ns.shape == taken["b"].ns.shape == (3, 4)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"engines": {}}, "engines"),
        ({"inputs": []}, "inputs"),
        ({"rounds": 0}, "rounds"),
        ({"calls": 0}, "calls"),
    ],
)
def test_nothing_to_measure_is_refused(change, argument):
    arguments = {"engines": {"a": lambda: None}, "inputs": [()], **change}
    with pytest.raises(ArgumentError) as caught:
        interleaved(arguments.pop("engines"), arguments.pop("inputs"), **arguments)
    assert caught.value.argument == argument


def test_samples_are_in_milliseconds():
    samples = Samples(np.arange(1, 101, dtype=np.int64).reshape(10, 10) * 1_000_000)
    assert samples.n == 100
    assert samples.p50_ms == pytest.approx(50.5)
    assert samples.p95_ms == pytest.approx(np.percentile(np.arange(1, 101), 95))
    assert samples.p99_ms == pytest.approx(np.percentile(np.arange(1, 101), 99))
    assert samples.mean_ms == pytest.approx(50.5)
    assert samples.best_round_ms == pytest.approx(5.5)
    assert samples.to_dict()["rounds"] == 10


def test_a_ratio_paired_by_round_does_not_widen_with_shared_noise():
    rng = np.random.default_rng(0)
    busy = rng.lognormal(0, 1, (40, 1)) * 1e6  # rounds up to ten times slower
    jitter = rng.normal(1, 0.01, (2, 40, 5))
    a = Samples((2 * busy * jitter[0]).astype(np.int64))
    b = Samples((busy * jitter[1]).astype(np.int64))
    paired = ratio(a, b)
    assert paired.low <= paired.value <= paired.high
    assert paired.low <= 2 <= paired.high
    assert paired.high - paired.low < 0.2
    assert ratio(a, a).low == ratio(a, a).high == 1


def test_a_ratio_needs_the_same_rounds():
    with pytest.raises(ArgumentError, match="3 rounds"):
        ratio(Samples(np.ones((3, 2), np.int64)), Samples(np.ones((4, 2), np.int64)))


def test_the_gate_passes_what_agrees_and_names_what_does_not():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 50))
    same = correctness_gate(scores, scores, Tolerance.for_precision("fp32"))
    assert same.passed
    assert same.top_10 == 1
    assert same.noise == 0
    off = scores.copy()
    off[2, 7] += 0.01
    assert not correctness_gate(scores, off, Tolerance.for_precision("fp32")).passed
    slightly = scores + rng.normal(size=scores.shape) * 0.1
    assert correctness_gate(scores, slightly, Tolerance.for_precision("int8")).passed
    unrelated = rng.normal(size=scores.shape)
    gate = correctness_gate(scores, unrelated, Tolerance.for_precision("int8"))
    assert not gate.passed
    with pytest.raises(BackendError, match="rival disagrees with torch: error is"):
        gate.require("rival")


def test_scores_that_differ_by_rounding_alone_agree_whatever_their_spread():
    scores = np.full((2, 5), 0.4790, np.float32)
    rounded = np.nextafter(scores, np.float32(1))
    scores[:, 0] = np.nextafter(scores[:, 0], np.float32(0))
    gate = correctness_gate(scores, rounded, Tolerance.for_precision("int8"))
    assert gate.passed
    assert gate.noise > 0.4
    assert not correctness_gate(scores, scores + 1e-4 * np.arange(5), Tolerance(noise=0.5)).passed


def test_a_shift_of_a_whole_request_is_no_noise_for_its_ranking():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    gate = correctness_gate(scores, scores + 5, Tolerance(noise=0.01))
    assert gate.passed
    assert gate.max_abs_error == pytest.approx(5)


def test_the_gate_refuses_nan_and_other_shapes():
    scores = np.ones((2, 5))
    broken = scores.copy()
    broken[0, 0] = np.nan
    assert "not finite" in (correctness_gate(scores, broken, Tolerance()).reason or "")
    with pytest.raises(ShapeError):
        correctness_gate(scores, scores[:1], Tolerance())
    with pytest.raises(ArgumentError, match="precision"):
        Tolerance.for_precision("fp8")


def test_a_child_reports_by_its_last_line():
    code = "print('chatter'); print('{\"peak_rss_mb\": 12.5}')"
    assert peak_rss_mb([sys.executable, "-c", code]) == 12.5


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('went wrong')", "status 1: went wrong"),
        ("print('no json')", "status 0"),
        ('print(\'{"error": "ArtifactError: x"}\')', "ArtifactError: x"),
        ("import time; time.sleep(30)", "ran past"),
    ],
)
def test_a_child_that_fails_is_an_error(code, message):
    with pytest.raises(BackendError, match=message):
        run_child([sys.executable, "-c", code], timeout_s=2)

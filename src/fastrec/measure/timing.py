"""Timing and agreement: interleaved rounds, a gate before any timing.

Engines' thread pools keep spinning after a call: measured on two cores, ONNX Runtime's workers
burn a core for 40 ms, libgomp's (torch) for 10 ms, OpenVINO's for 1 ms. An engine timed inside
another one's spin loses a core, so each turn starts with a pause and uncounted calls. Every engine
gets the same inputs in the same round, in an order that changes by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, BackendError, ShapeError

# Error of a float32 sum of K = 1024 rounded products, relative to its scale: sqrt(K) * 2^-24.
# Within it, scores agree however small their spread is (a request whose candidates are all alike).
ROUNDING = 2e-6

# Longer than the slowest pool's spin (ONNX Runtime, 40 ms); used where an engine states no spin_s.
SETTLE_S = 0.05


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Samples:
    """Call times of one engine, int64 nanoseconds [rounds, calls per round]."""

    ns: np.ndarray

    @property
    def n(self) -> int:
        """Calls measured."""
        return int(self.ns.size)

    def percentile_ms(self, q: float) -> float:
        """The ``q``-th percentile (0 to 100) in milliseconds."""
        return float(np.percentile(self.ns, q)) / 1e6

    @property
    def p50_ms(self) -> float:
        """Median in milliseconds."""
        return self.percentile_ms(50)

    @property
    def p95_ms(self) -> float:
        """95th percentile in milliseconds."""
        return self.percentile_ms(95)

    @property
    def p99_ms(self) -> float:
        """99th percentile in milliseconds."""
        return self.percentile_ms(99)

    @property
    def mean_ms(self) -> float:
        """Mean in milliseconds."""
        return float(self.ns.mean()) / 1e6

    @property
    def best_round_ms(self) -> float:
        """Median of the quietest round: the steadiest figure on a shared machine."""
        return float(np.median(self.ns, axis=1).min()) / 1e6

    @property
    def quiet_ms(self) -> float:
        """Lower quartile of the rounds' medians: steadier than the quietest round where engines are
        compared, because one lucky round does not decide."""
        return float(np.percentile(np.median(self.ns, axis=1), 25)) / 1e6

    def to_dict(self) -> dict[str, float | int]:
        """Plain JSON types: p50, p95, p99, mean and best_round in milliseconds, n and rounds."""
        return {
            "p50": self.p50_ms,
            "p95": self.p95_ms,
            "p99": self.p99_ms,
            "mean": self.mean_ms,
            "best_round": self.best_round_ms,
            "n": self.n,
            "rounds": int(self.ns.shape[0]),
        }


def ratio(a: Samples, b: Samples, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Median of ``a`` over median of ``b`` with a 95 % interval, paired by round.

    Rounds are what is drawn again, the same ones for both: a busy neighbour slows a whole round, so
    calls within a round are not independent.

    Raises:
        ArgumentError: the two do not come from the same rounds.
    """
    if a.ns.shape[0] != b.ns.shape[0]:
        raise ArgumentError("b", f"{a.ns.shape[0]} rounds, as a has", f"{b.ns.shape[0]} rounds")
    rounds = a.ns.shape[0]
    draws = np.random.default_rng(seed).integers(0, rounds, (resamples, rounds))
    # [resamples, rounds * calls]
    top = np.median(a.ns[draws].reshape(resamples, -1), axis=1)
    bottom = np.median(b.ns[draws].reshape(resamples, -1), axis=1)
    low, high = np.percentile(top / bottom, [2.5, 97.5])
    return Interval(float(np.median(a.ns) / np.median(b.ns)), float(low), float(high))


def measured_spin_s(call: Callable[[], Any], *, looks: int = 3, look_s: float = 0.06) -> float:
    """How long a call's worker threads keep spinning after it, in seconds of wall time.

    Read from the CPU time of the whole process while this thread sleeps for ``look_s`` (longer than
    the slowest pool known, ONNX Runtime's 40 ms); the longest of the looks, half as much again
    because spinning threads that share a core take longer.
    """
    burnt = 0.0
    for _ in range(looks):
        call()
        before = time.process_time()
        time.sleep(look_s)
        burnt = max(burnt, time.process_time() - before)
    # Below half a millisecond it is this thread falling asleep and waking up.
    return 0.0 if burnt < 5e-4 else min(1.5 * burnt, look_s)


def interleaved(
    engines: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    *,
    rounds: int = 20,
    calls: int | Mapping[str, int] = 5,
    warmup: int = 3,
    warm_s: float | Mapping[str, float | None] = 0.0,
    settle_s: float | None = None,
    seconds_budget: float | None = None,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Samples]:
    """Time every engine in turn, round by round, on the same inputs.

    Args:
        engines: name -> callable; called as ``engine(*inputs[i])``.
        inputs: the requests; call j of round r takes ``inputs[(r * calls + j) % len(inputs)]``
            for every engine.
        rounds: rounds wanted.
        calls: counted calls per engine and round, after the turn's uncounted ones; a mapping gives
            each engine its own number (fewer for one that takes long).
        warmup: uncounted calls per engine before the first round.
        warm_s: an engine's turn begins with uncounted calls for this long, at least one: they wake
            its own threads and bring its data back into the caches. A mapping gives each engine
            its own; None there leaves them out, for calls so long that it does not show.
        settle_s: pause before each turn in seconds; None means the ``spin_s`` that the engine timed
            before states, or 50 ms where it states none.
        seconds_budget: stop after the round in which this much time is spent; at least one is
            always whole, and every engine has the same number of rounds.
        seed: of the order within each round.
        clock: nanoseconds, injectable.
        sleep: seconds, injectable.

    Raises:
        ArgumentError: no engine, no input, or a count below 1.
    """
    if not engines:
        raise ArgumentError("engines", "at least one engine", "none")
    if not inputs:
        raise ArgumentError("inputs", "at least one request", "none")
    names = list(engines)
    counts = dict(calls) if isinstance(calls, Mapping) else dict.fromkeys(names, calls)
    if counts.keys() != engines.keys():
        raise ArgumentError("calls", f"a count for each of {sorted(names)}", sorted(counts))
    for name, value in (("rounds", rounds), ("calls", min(counts.values()))):
        if value < 1:
            raise ArgumentError(name, "a positive integer", value)
    order = np.random.default_rng(seed)
    deadline = None if seconds_budget is None else clock() + int(seconds_budget * 1e9)

    def pause(previous: str | None) -> None:
        seconds = settle_s
        if seconds is None and previous is not None:
            seconds = getattr(engines[previous], "spin_s", SETTLE_S)
        if seconds:
            sleep(seconds)

    previous: str | None = None
    for name in names:
        pause(previous)
        for i in range(warmup):
            engines[name](*inputs[i % len(inputs)])
        previous = name
    taken: dict[str, list[list[int]]] = {name: [] for name in names}
    for r in range(rounds):
        for i in order.permutation(len(names)):
            name = names[i]
            engine = engines[name]
            pause(previous)
            first, times = r * counts[name], []
            warm = warm_s[name] if isinstance(warm_s, Mapping) else warm_s
            if warm is not None:
                awake = clock() + int(warm * 1e9)
                engine(*inputs[first % len(inputs)])
                while clock() < awake:
                    engine(*inputs[first % len(inputs)])
            for j in range(counts[name]):
                request = inputs[(first + j) % len(inputs)]
                start = clock()
                engine(*request)
                times.append(clock() - start)
            taken[name].append(times)
            previous = name
        if deadline is not None and clock() >= deadline:
            break
    return {name: Samples(np.array(rows, dtype=np.int64)) for name, rows in taken.items()}


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference between an engine's scores and the reference's.

    Args:
        relative: largest |error| allowed, as a share of the largest |reference| score.
        noise: largest root mean square error allowed, as a share of the spread (standard deviation)
            of the reference's scores within a request: 0 agrees, 1 is as bad as a constant.
    """

    relative: float | None = None
    noise: float | None = None

    @classmethod
    def for_precision(cls, precision: str) -> Tolerance:
        """The policy for ``fp32``, ``bf16``, ``fp16`` or ``int8``.

        fp32: a sum of K = 1024 rounded products is off by about sqrt(K) * 2^-24 = 2e-6 of its
        scale; some twenty dependent layers add up to 4e-5, so 1e-4 holds with room and any wrong
        operator breaks it. bf16 rounds at 2^-9, 32,768 times coarser, fp16 at 2^-12, int8
        coarser than both: there the ranking is what has to survive, so the error is held against
        the spread of the scores.
        """
        policies = {
            "fp32": cls(relative=1e-4),
            "bf16": cls(noise=0.25),
            "fp16": cls(noise=0.25),
            "int8": cls(noise=0.5),
        }
        if precision not in policies:
            raise ArgumentError("precision", f"one of {sorted(policies)}", precision)
        return policies[precision]


@dataclass(frozen=True)
class Agreement:
    """Comparison of scores with the reference's; ``reason`` is None where they pass."""

    max_abs_error: float
    relative_error: float
    noise: float
    top_10: float
    reason: str | None = field(default=None)

    @property
    def passed(self) -> bool:
        """Whether the policy holds."""
        return self.reason is None

    def require(self, name: str) -> None:
        """Raise BackendError naming ``name`` unless the policy holds."""
        if self.reason is not None:
            raise BackendError(f"{name} disagrees with torch: {self.reason}")

    def to_dict(self) -> dict[str, float | str | None]:
        """Plain JSON types."""
        return {
            "max_abs_error": self.max_abs_error,
            "relative_error": self.relative_error,
            "noise": self.noise,
            "top_10": self.top_10,
            "reason": self.reason,
        }


def correctness_gate(
    reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance
) -> Agreement:
    """Compare scores [..., m] before any timing.

    ``top_10`` is the mean share of the reference's ten best of m that the candidate also has among
    its ten best (all of them where m <= 10).

    Raises:
        ShapeError: the two have different shapes.
    """
    reference = np.asarray(reference, dtype=np.float64)
    candidate = np.asarray(candidate, dtype=np.float64)
    if reference.shape != candidate.shape:
        raise ShapeError(
            "candidate", f"shape {list(reference.shape)}", f"shape {list(candidate.shape)}"
        )
    m = reference.shape[-1]
    reference, candidate = reference.reshape(-1, m), candidate.reshape(-1, m)
    # Scores of -inf hide candidates: the same ones in both agree, and so do NaNs of torch's.
    alike = ~np.isfinite(reference)
    alike &= (reference == candidate) | (np.isnan(reference) & np.isnan(candidate))
    reference, candidate = (np.where(alike, 0.0, scores) for scores in (reference, candidate))
    error = candidate - reference
    bad = int((~np.isfinite(candidate)).sum())
    if bad:
        nan = float("nan")
        return Agreement(nan, nan, nan, 0.0, f"{bad} scores are not finite")
    tiny = np.finfo(np.float64).tiny
    largest = float(np.abs(error).max(initial=0.0))
    relative = largest / max(float(np.abs(reference).max(initial=0.0)), tiny)
    # Subtract the mean shift of a request: it does not affect the ranking.
    wobble = float(np.sqrt(error.var(axis=-1).mean())) if error.size else 0.0
    spread = float(np.sqrt(reference.var(axis=-1).mean())) if error.size else 0.0
    noise = 0.0 if wobble == 0 else wobble / max(spread, tiny)
    k = min(10, m)
    best = np.argpartition(-reference, k - 1, axis=-1)[:, :k]
    found = np.argpartition(-candidate, k - 1, axis=-1)[:, :k]
    shared = [np.intersect1d(a, b).size / k for a, b in zip(best, found, strict=True)]
    top_10 = float(np.mean(shared)) if shared else 1.0
    reason = None
    if tolerance.relative is not None and relative > tolerance.relative:
        reason = f"largest error is {relative:.2e} of the largest score (> {tolerance.relative:g})"
    elif tolerance.noise is not None and noise > tolerance.noise and relative > ROUNDING:
        reason = f"error is {noise:.2f} of the scores' spread (> {tolerance.noise:g})"
    return Agreement(largest, relative, noise, top_10, reason)

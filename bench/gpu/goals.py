"""What the GPU's kernels have to reach, as data; judged on the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Measured = Callable[[list[Row], dict[str, float]], "float | None"]

LONG = "attention B=8 H=8 L=8192 D=64, window 64 + log2, bf16"
SHORT = "attention B=64 H=4 L=100 D=32, window 16 + log2, bf16, forward"


@dataclass(frozen=True)
class Goal:
    """``measure(rows, ceilings)`` is None where a row that it needs was not measured."""

    name: str
    measure: Measured
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, rows: list[Row], ceilings: dict[str, float]) -> dict[str, Any]:
        """The goal's line in the report."""
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        value = self.measure(rows, ceilings)
        verdict = "not measured"
        if value is not None:
            low = self.at_least is None or value >= self.at_least
            verdict = (
                "reached" if low and (self.at_most is None or value <= self.at_most) else "missed"
            )
        return {"goal": self.name, "bound": bound, "measured": value, "verdict": verdict}


def _of(rows: Iterable[Row], what: str, engine: str) -> list[Row]:
    return [r for r in rows if r.get("what", "").startswith(what) and engine in r.get("engine", "")]


def _best(rows: Iterable[Row], what: str, engine: str, key: str = "device_us") -> float | None:
    found = [row[key] for row in _of(rows, what, engine) if row.get(key) is not None]
    return min(found, default=None)


def times(what: str, rival: str, ours: str = "fastrec") -> Measured:
    """How many times the device time of the best of ours the rival's best takes."""

    def measure(rows: list[Row], ceilings: dict[str, float]) -> float | None:
        mine, theirs = _best(rows, what, ours), _best(rows, what, rival)
        return None if mine is None or theirs is None else theirs / mine

    return measure


def device_us(what: str, engine: str) -> Measured:
    return lambda rows, ceilings: _best(rows, what, engine)


def share_of_copy(what: str) -> Measured:
    """Of the bytes a second that a copy reaches in the same run."""

    def measure(rows: list[Row], ceilings: dict[str, float]) -> float | None:
        found = [r["gb_per_s"] for r in _of(rows, what, "fastrec") if r.get("gb_per_s")]
        return max(found) * 1e9 / ceilings["copy"] if found and "copy" in ceilings else None

    return measure


def worst(what: str, key: str) -> Measured:
    def measure(rows: list[Row], ceilings: dict[str, float]) -> float | None:
        return max((r[key] for r in _of(rows, what, "fastrec") if key in r), default=None)

    return measure


def linear(kind: str, size: str = "M=3200 K=N=1024") -> str:
    return f"int8 linear {size}, {kind}"


COMPILED = "torch.compile"
GOALS = (
    Goal("long attention, times FlexAttention", times(f"{LONG}, forward", "Flex"), at_least=2.5),
    Goal("long attention, times SDPA flash", times(f"{LONG}, forward", "SDPA"), at_least=10),
    Goal(
        "long attention, forward and backward, times FlexAttention",
        times(f"{LONG}, forward and backward", "Flex"),
        at_least=2,
    ),
    Goal(
        "long attention, share of the copy's bytes/s",
        share_of_copy(f"{LONG}, forward"),
        at_least=0.6,
    ),
    Goal("short attention, times SDPA flash", times(SHORT, "SDPA"), at_least=1.5),
    Goal("int8 linear dense, times _int_mm", times(linear("density 1"), "_int_mm"), at_least=1),
    Goal(
        "int8 linear, 50 % sparse, times _int_mm",
        times(linear("density 0.5"), "_int_mm"),
        at_least=1.5,
    ),
    Goal(
        "int8 linear, 75 % sparse, times _int_mm",
        times(linear("density 0.25"), "_int_mm"),
        at_least=2.5,
    ),
    Goal(
        "int8 linear 2:4 at 4,096, times _int_mm",
        times(linear("2:4", "M=4096 K=N=4096"), "_int_mm"),
        at_least=1.5,
    ),
    Goal("ranker int8 B=1, device us", device_us("ranker B=1", "fastrec, int8"), at_most=60),
    Goal("ranker int8 B=64, device us", device_us("ranker B=64", "fastrec, int8"), at_most=150),
    Goal(
        "ranker B=1, times torch.compile",
        times("ranker B=1", COMPILED, "fastrec, int8"),
        at_least=3,
    ),
    Goal(
        "ranker B=64, times torch.compile",
        times("ranker B=64", COMPILED, "fastrec, int8"),
        at_least=3,
    ),
    Goal("launches a request, at most", worst("launches a request", "launches"), at_most=8),
    Goal("kernels compiled for 1,000 lengths", worst("kernels compiled", "compiled"), at_most=0),
)

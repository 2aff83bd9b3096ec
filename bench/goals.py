"""What the kernels have to reach, as data; judged on the rows of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from measuring import KERNEL, OURS

Row = dict[str, Any]
Picked = Callable[[Row], bool]


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval; ``limit`` is the value at the machine's ceiling and ``by``
    says which."""

    value: float
    low: float
    high: float
    limit: float | None = None
    by: str = ""


@dataclass(frozen=True)
class Goal:
    """``measure(rows)`` is None where a row that it needs was not measured."""

    name: str
    measure: Callable[[list[Row]], Measured | None]
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, rows: list[Row]) -> dict[str, Any]:
        """The goal's line in the report."""
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        line: dict[str, Any] = {"goal": self.name, "bound": bound}
        found = self.measure(rows)
        if found is None:
            return line | {"measured": None, "verdict": "not measured"}
        if self.at_least is not None:
            reached = found.value >= self.at_least
        else:
            reached = found.value <= (self.at_most or 0.0)
        return line | {
            "measured": found.value,
            "ci95": [found.low, found.high],
            "verdict": "reached" if reached else "missed",
            "limit": found.limit,
            "limited_by": found.by,
        }


def _timed(rows: list[Row], op: str, threads: int, where: Picked, mode: str) -> list[Row]:
    return [
        row
        for row in rows
        if row["op"] == op
        and row["threads"] == threads
        and row["mode"] == mode
        and row.get("us")
        and where(row)
    ]


def _ours(rows: list[Row], op: str, threads: int, where: Picked) -> list[Row]:
    """Our forward's row, the kernel's own first where it was timed apart."""
    found = _timed(rows, op, threads, where, "forward")
    return [row for name in (KERNEL, OURS) for row in found if row["engine"] == name]


def _quotient(top: Row, bottom: Row, *, seed: int = 0) -> tuple[float, float, float]:
    """Of two cases' medians; their rounds are not paired, so each is drawn again on its own."""
    draw = np.random.default_rng(seed)
    a, b = np.array(top["round_us"]), np.array(bottom["round_us"])
    many = np.median(draw.choice(a, (1000, a.size)), 1) / np.median(
        draw.choice(b, (1000, b.size)), 1
    )
    low, high = np.percentile(many, [2.5, 97.5])
    return top["us"]["p50"] / bottom["us"]["p50"], float(low), float(high)


def faster(
    op: str, threads: int, where: Picked, rival: Picked, mode: str = "forward"
) -> Callable[[list[Row]], Measured | None]:
    """How many times faster ours is than the fastest of the rivals picked."""

    def measure(rows: list[Row]) -> Measured | None:
        found = _timed(rows, op, threads, where, mode)
        ours = next((row for row in found if row["engine"] == OURS), None)
        others = [row for row in found if row["engine"] not in (OURS, KERNEL) and rival(row)]
        if ours is None or not others:
            return None
        best = min(others, key=lambda row: row["us"]["p50"])
        gain = best["fastrec_is_faster_by"]
        limit = best["us"]["p50"] / ours["limit_us"] if ours.get("limit_us") else None
        by = f"{ours['limited_by']}, against {best['engine']}" if limit else best["engine"]
        return Measured(gain["x"], *gain["ci95"], limit, by)

    return measure


def share(op: str, threads: int, where: Picked, of: str) -> Callable[[list[Row]], Measured | None]:
    """The kernel's share of the measured "peak" or "bandwidth"."""

    def measure(rows: list[Row]) -> Measured | None:
        found = _ours(rows, op, threads, where)
        if not found or not found[0].get(f"{of}_share"):
            return None
        row = found[0]
        rounds, value = np.array(row["round_us"]), row[f"{of}_share"]
        drawn = np.random.default_rng(0).choice(rounds, (1000, rounds.size))
        low, high = np.percentile(np.median(drawn, 1) / row["us"]["p50"], [2.5, 97.5])
        # The roofline: the share that is left where the other ceiling is the lower one.
        at_limit = value * row["us"]["p50"] / row["limit_us"]
        return Measured(value, float(value / high), float(value / low), at_limit, row["limited_by"])

    return measure


def cost(
    op: str, threads: tuple[int, int], top: Picked, bottom: Picked, by: str
) -> Callable[[list[Row]], Measured | None]:
    """Our time of one case over that of another, or over itself on other threads; the limit is the
    quotient of their limits."""

    def measure(rows: list[Row]) -> Measured | None:
        pair = []
        for count, where in zip(threads, (top, bottom), strict=True):
            found = _ours(rows, op, count, where)
            if not found:
                return None
            pair.append(found[0])
        return Measured(*_quotient(*pair), pair[0]["limit_us"] / pair[1]["limit_us"], by)

    return measure


def labelled(**wanted: Any) -> Picked:
    """Rows whose sample has these labels."""
    return lambda row: all(row["labels"].get(name) == value for name, value in wanted.items())


def named(*words: str, but: tuple[str, ...] = ()) -> Picked:
    """Rows whose engine's name has all of these words and none of those."""
    return lambda row: (
        all(w in row["engine"] for w in words) and not any(w in row["engine"] for w in but)
    )


def fp32_case(picked: Picked) -> Picked:
    return lambda row: picked(row) and "bfloat16" not in row["case"]


def declared(thread_counts: list[int]) -> list[Goal]:
    """The table of goals, for the thread counts that were measured."""
    most = max(thread_counts)
    attention = "window_sparse_attention"
    long = fp32_case(labelled(batch=1, heads=4, length=8192, dims=32))
    half = fp32_case(labelled(batch=1, heads=4, length=4096, dims=32))
    masked, flex = named("SDPA", "mask"), named("FlexAttention")
    goals = []
    for n in thread_counts:
        t = f"{n} thread{'s' * (n > 1)}"
        goals += [
            Goal(f"attention L=8192 over SDPA + mask, {t}", faster(attention, n, long, masked), 30),
            Goal(f"attention L=8192 over FlexAttention, {t}", faster(attention, n, long, flex), 12),
            Goal(
                f"attention L=8192 forward + backward over SDPA autograd, {t}",
                faster(attention, n, long, named("SDPA"), "training"),
                15,
            ),
        ]
        for batch in (1, 64):
            short = fp32_case(labelled(batch=batch, length=100, dims=32))
            dense = named("SDPA", but=("mask",))
            name = f"attention L=100, B={batch} over SDPA dense, {t}"
            goals.append(Goal(name, faster(attention, n, short, dense), 2))
        goals.append(
            Goal(
                f"attention cost L=8192 over 4096, {t}",
                cost(attention, (n, n), long, half, "operations or bytes"),
                at_most=2.2,
            )
        )
        grouped = fp32_case(labelled(rows=6400, groups=4, outputs=64, inputs=64))
        dense, bmm = named("dense"), named("bmm")
        goals += [
            Goal(
                f"grouped_linear 6400 x 256, G=4 over nn.Linear, {t}",
                faster("grouped_linear", n, grouped, dense),
                3,
            ),
            Goal(
                f"grouped_linear 6400 x 256, G=4 over torch.bmm, {t}",
                faster("grouped_linear", n, grouped, bmm),
                1.5,
            ),
        ]
    linear = "sparse_int8_linear"
    int8 = named("int8", but=("sparse", "activations"))

    def square(rows: int, density: float) -> Picked:
        return labelled(rows=rows, inputs=1024, outputs=1024, density=density)

    for density, at_least in ((1.0, 0.90), (0.6, 0.88), (0.25, 0.80)):
        name = f"{linear} M=50, density {density:g}: share of the vpdpbusd peak, 1 thread"
        goals.append(Goal(name, share(linear, 1, square(50, density), "peak"), at_least))
        if most > 1:
            one, two = (1, most), square(50, density)
            name = f"{linear} M=50, density {density:g}: {most} threads against 1"
            by = "compute or bandwidth of the threads together"
            goals.append(Goal(name, cost(linear, one, two, two, by), 0.9 * most))
    for n in thread_counts:
        t = f"{n} thread{'s' * (n > 1)}"
        for rows in (50, 400):
            for density, at_least in ((1.0, 1.4), (0.6, 2.2), (0.25, 4.5)):
                name = f"{linear} M={rows}, density {density:g} over the best dense INT8, {t}"
                goals.append(Goal(name, faster(linear, n, square(rows, density), int8), at_least))
    for shape in ((1024, 1024), (2048, 2048)):
        one = labelled(rows=1, outputs=shape[0], inputs=shape[1], density=1.0)
        name = f"{linear} M=1, {shape[0]} x {shape[1]}: share of the read bandwidth, 1 thread"
        goals.append(Goal(name, share(linear, 1, one, "bandwidth"), 0.75))
    return goals

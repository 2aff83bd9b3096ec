"""Choosing a setting by measuring it on the example inputs, and saying so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastrec.measure.timing import Samples, interleaved


def fastest(
    candidates: Mapping[str, Callable[..., Any]],
    inputs: tuple[Any, ...],
    *,
    rounds: int = 6,
    calls: int = 4,
    seconds: float = 3.0,
    settle_s: float | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """The candidate with the fastest quiet round, and a row for ``describe()`` for each.

    One candidate is taken unmeasured. The quietest round's median is compared, because builds
    happen on busy machines and noise only ever adds time.
    """
    names = list(candidates)
    if len(names) == 1:
        return names[0], [choice(names[0], True, None, "the only candidate")]
    taken = interleaved(
        candidates,
        [inputs],
        rounds=rounds,
        calls=calls,
        seconds_budget=seconds,
        settle_s=settle_s,
    )
    best = min(names, key=lambda name: taken[name].best_round_ms)
    batch = len(inputs[0])
    rows = [
        choice(name, name == best, taken[name], f"measured on the example inputs, B={batch}")
        for name in names
    ]
    return best, rows


def contest(
    engines: Mapping[str, Callable[..., Any]],
    inputs: tuple[Any, ...],
    *,
    seconds: float = 10.0,
    near: float = 1.3,
) -> tuple[str, dict[str, Samples]]:
    """The fastest engine, and what each took: all in a few rounds, then those within ``near`` times
    the best in many, because two engines a few per cent apart are not told apart by few."""
    taken = interleaved(engines, [inputs], rounds=8, calls=4, seconds_budget=seconds / 2)
    least = min(samples.best_round_ms for samples in taken.values())
    close = {n: e for n, e in engines.items() if taken[n].best_round_ms <= near * least}
    if len(close) > 1:
        taken |= interleaved(
            close, [inputs], rounds=40, calls=4, warm_s=0.005, seconds_budget=seconds / 2
        )
    return min(close, key=lambda name: taken[name].quiet_ms), taken


def choice(name: str, chosen: bool, samples: Samples | None, why: str) -> dict[str, Any]:
    """A row of ``describe()`` about one candidate setting."""
    return {
        "op": "choice",
        "setting": name,
        "chosen": chosen,
        "p50_ms": None if samples is None else round(samples.best_round_ms, 4),
        "why": why,
    }

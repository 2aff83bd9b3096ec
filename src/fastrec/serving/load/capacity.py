"""C, the capacity: the highest Poisson rate at which enough requests are answered in time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastrec.errors import ArgumentError

Probe = Callable[[float], Awaitable[dict[str, Any]]]


async def find_capacity(
    probe: Probe,
    *,
    start: float = 50.0,
    target: float = 0.99,
    precision: float = 0.05,
    most: float = 1e6,
    note: Callable[[float, float], None] = lambda rate, attainment: None,
) -> float:
    """Doubles the rate until the goal is missed, then halves the interval.

    A rate that misses is tried once more: one pause of the machine says nothing of capacity.

    Args:
        probe: runs a load at a rate (requests a second) and returns its summary.
        start: first rate.
        target: share of the offered requests that must be in time.
        precision: the answer is at most this share below the true rate.
        most: never tried beyond.
        note: called with each rate and its attainment.

    Returns:
        the highest rate that met the goal; 0.0 where a thousandth of ``start`` misses it.

    Raises:
        ArgumentError: ``start`` or ``precision`` is not above 0.
    """
    for name, value in (("start", start), ("precision", precision)):
        if not value > 0:
            raise ArgumentError(name, "a number above 0", value)

    async def meets(rate: float) -> bool:
        for _ in range(2):
            reached = (await probe(rate))["all"]["attainment"] or 0.0
            note(rate, reached)
            if reached >= target:
                return True
        return False

    low, high = 0.0, start
    while high <= most and await meets(high):
        low, high = high, 2 * high
    if high > most:
        return low
    while not low and high > start / 1000:
        if await meets(high / 2):
            low = high / 2
        else:
            high /= 2
    while low and high - low > precision * low:
        middle = (low + high) / 2
        if await meets(middle):
            low = middle
        else:
            high = middle
    return low

"""The front of predicted cost and quality, and which of its points are tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fastrec.search.budget import Budget
from fastrec.search.costs import CostTable, Measured
from fastrec.search.journal import fingerprint
from fastrec.search.space import Choice, Unit

_WEIGHTS = np.geomspace(1e-5, 1e4, 90)  # of cost against quality, in the sweep


@dataclass(frozen=True)
class Candidate:
    """A choice for every layer, and what is expected of it."""

    chosen: dict[str, Choice]
    cost: Measured
    loss: float

    @property
    def key(self) -> str:
        """Names the choices, whatever the order."""
        return fingerprint(nn.Module(), sorted((n, c.name) for n, c in self.chosen.items()))[:12]


def sweep(
    units: Sequence[Unit],
    table: CostTable,
    losses: Mapping[tuple[str, str], float],
    budget: Budget,
) -> list[Candidate]:
    """The front of predicted cost and quality, cheapest first.

    With a price on each cost, layers can be chosen independently: each takes the choice of least
    loss + price x cost (Lagrange multipliers). Each price gives a point of the convex hull of the
    front, and the sweep over prices gives all of them.
    """
    whole = table.predict({unit.name: unit.choices[0] for unit in units})
    spent = (whole.latency_ms * 1e3, whole.size_mb * 1e6)
    limited = tuple(name in budget.limits for name in ("latency_ms", "size_mb"))
    # With one limit, only its cost has a price.
    shares = [(1.0, 0.0)] if limited == (True, False) else [(0.0, 1.0)]
    if all(limited):
        shares = [(share, 1 - share) for share in np.linspace(0.0, 1.0, 11)]
    worst = max((loss for loss in losses.values() if loss < math.inf), default=0.0) or 1.0
    tables = []
    for unit in units:
        costs = np.array([table.cost(unit, choice) for choice in unit.choices]) / spent
        tables.append((np.array([losses[unit.name, c.name] for c in unit.choices]), costs))
    found: dict[tuple[int, ...], None] = {}
    for price in _WEIGHTS * worst:
        for share in shares:
            best = (int(np.argmin(lost + price * (costs @ share))) for lost, costs in tables)
            found[tuple(best)] = None
    candidates = []
    for places in found:
        chosen = {u.name: u.choices[place] for u, place in zip(units, places, strict=True)}
        loss = sum(losses[name, choice.name] for name, choice in chosen.items())
        candidates.append(Candidate(chosen, table.predict(chosen), loss))
    candidates.sort(key=lambda c: (budget.use(c.cost), c.loss))
    front: list[Candidate] = []
    for candidate in candidates:
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def pick(
    front: Sequence[Candidate], budget: Budget, count: int, factor: float = 1.0
) -> list[Candidate]:
    """``count`` points of the front: two thirds from within the budget, most of them near it, and
    the rest from above it. ``factor``: measured over predicted."""
    within = [c for c in front if factor * budget.use(c.cost) <= 1][::-1]
    above = [c for c in front if factor * budget.use(c.cost) > 1]
    if not within:
        within, above = list(front[:1]), list(front[1:])
    n_above = min(len(above), count // 3)
    n_within = min(len(within), count - n_above)
    return [*_spread(within, n_within), *_spread(above, n_above)]


def _spread(items: Sequence[Candidate], count: int) -> list[Candidate]:
    """``count`` of the items, the first and the last among them, denser at the first."""
    if count >= len(items):
        return list(items)
    last = len(items) - 1
    places: list[int] = []
    for i in range(count):
        place = round(last * (i / max(1, count - 1)) ** 2)
        places.append(max(place, places[-1] + 1) if places else place)
    return [items[place] for place in places]

"""Negative candidates: distinct in each row, never the positive, by popularity or uniformly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastrec.errors import ArgumentError

Int64 = NDArray[np.int64]

KINDS = ("popularity", "uniform")
_ROUNDS = 16
_SORT_ABOVE = 1 << 17


class NegativeSampler:
    """Draws negatives without replacement within a row (successive sampling).

    Args:
        kind: ``popularity``: item i with probability proportional to ``item_count[i]``; items
            with no train event are never drawn. ``uniform``: every item alike.
        item_count: int64 [n_items], train events of each item; row 0 is padding.
    """

    def __init__(self, kind: str, item_count: Int64) -> None:
        if kind not in KINDS:
            raise ArgumentError("negatives", " or ".join(map(repr, KINDS)), repr(kind))
        self.kind = kind
        self._n_items = len(item_count)
        if kind == "popularity":
            self._weight = item_count.astype(np.float64)
            self._cumulative = np.cumsum(item_count)
            self.n_drawable = int(np.count_nonzero(item_count))
        else:
            self._weight = np.ones(self._n_items)
            self._weight[0] = 0
            self.n_drawable = self._n_items - 1

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Int64:
        """Independent draws, int64, in exact integer arithmetic."""
        if self.kind == "uniform":
            return rng.integers(1, self._n_items, shape)
        events = rng.integers(0, self._cumulative[-1], shape)
        if self._n_items < _SORT_ABOVE:
            return np.searchsorted(self._cumulative, events, side="right").astype(np.int64)
        # Searching in ascending order walks the table once instead of missing the cache each time.
        flat = events.ravel()
        order = np.argsort(flat)
        items = np.empty(len(flat), np.int64)
        items[order] = np.searchsorted(self._cumulative, flat[order], side="right")
        return items.reshape(shape)

    def sample(
        self, rng: np.random.Generator, positive: Int64, k: int, seen: Int64 | None = None
    ) -> Int64:
        """int64 [B, k]: distinct items in each row, none equal to ``positive`` [B] or to an item
        of ``seen``.

        Args:
            rng: of all draws.
            positive: int64 [B].
            k: negatives of each row.
            seen: int64 [B, S], items that are no negatives; 0 = nothing.

        Raises:
            ArgumentError: fewer than k items are left for some row.
        """
        negatives = self.draw(rng, (len(positive), k))
        rows = np.arange(len(positive))
        for _ in range(_ROUNDS):
            part = negatives[rows]
            bad = _collisions(part, positive[rows], None if seen is None else seen[rows])
            again = bad.any(axis=1)
            if not again.any():
                return negatives
            rows, part, bad = rows[again], part[again], bad[again]
            part[bad] = self.draw(rng, (int(bad.sum()),))
            negatives[rows] = part
        # What is left wants items that are hard to hit: draw those rows exactly, one by one.
        part = negatives[rows]
        bad = _collisions(part, positive[rows], None if seen is None else seen[rows])
        for row in rows[bad.any(axis=1)]:
            forbidden = positive[row : row + 1]
            if seen is not None:
                forbidden = np.append(forbidden, seen[row])
            negatives[row] = self._sample_row(rng, forbidden, k)
        return negatives

    def _sample_row(self, rng: np.random.Generator, forbidden: Int64, k: int) -> Int64:
        """Successive sampling by Gumbel top-k over the whole catalogue."""
        weight = self._weight.copy()
        weight[forbidden] = 0
        allowed = np.flatnonzero(weight)
        if len(allowed) < k:
            raise ArgumentError(
                "n_candidates", f"<= {len(allowed) + 1} (items left to draw for a user)", k + 1
            )
        keys = np.log(weight[allowed]) + rng.gumbel(size=len(allowed))
        return allowed[np.argpartition(-keys, k - 1)[:k]]


def _collisions(negatives: Int64, positive: Int64, seen: Int64 | None) -> NDArray[np.bool_]:
    """bool [B, k]: equals the positive, an item of ``seen``, or an earlier column of its row."""
    bad = negatives == positive[:, None]
    if seen is not None:
        bad |= (negatives[:, :, None] == seen[:, None, :]).any(axis=2)
    order = np.argsort(negatives, axis=1, kind="stable")
    ranked = np.take_along_axis(negatives, order, axis=1)
    repeat = np.zeros_like(bad)
    repeat[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    duplicate = np.empty_like(bad)
    np.put_along_axis(duplicate, order, repeat, axis=1)
    return bad | duplicate

"""The catalogue of a synthetic log: categories, their popularity, items and successors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastrec.errors import ArgumentError

N_SUCCESSORS = 5
N_STYLES = 8
_CATEGORY_SHIFT, _CATEGORY_EXPONENT = 4.0, 1.2
_ITEM_SHIFT, _ITEM_EXPONENT = 8.0, 0.9
# A user never sees the same item twice in a row, so each category needs a second one.
_MIN_ITEMS = 2


@dataclass(frozen=True)
class SyntheticCatalogue:
    """Categories are numbered by popularity (0 = most popular), items by category, then rank.

    Attributes:
        cdf: float64 [C], cumulative popularity of the categories.
        first_item: int64 [C + 1]; items of category c are first_item[c] .. first_item[c+1] - 1.
        successors: int32 [C, 5], the categories that tend to follow a category.
        item_label, category_label: int64, the public id of each (a random permutation from 1).
    """

    cdf: NDArray[np.float64]
    first_item: NDArray[np.int64]
    successors: NDArray[np.int32]
    item_label: NDArray[np.int64]
    category_label: NDArray[np.int64]

    @classmethod
    def make(cls, n_items: int, n_categories: int, seed: int) -> SyntheticCatalogue:
        """Category k (from 1) has popularity (k + 4)^-1.2, and a like share of the items."""
        if n_categories < N_STYLES:
            raise ArgumentError("n_categories", f">= {N_STYLES}", n_categories)
        if n_items < _MIN_ITEMS * n_categories:
            raise ArgumentError(
                "n_items", f">= {_MIN_ITEMS * n_categories} (two for each category)", n_items
            )
        rng = np.random.default_rng([seed, 0])
        weight = (np.arange(1, n_categories + 1) + _CATEGORY_SHIFT) ** -_CATEGORY_EXPONENT
        cdf = np.cumsum(weight / weight.sum())
        cdf[-1] = 1.0
        spare = n_items - _MIN_ITEMS * n_categories
        first_item = np.zeros(n_categories + 1, np.int64)
        first_item[1:] = np.floor(cdf * spare) + _MIN_ITEMS * np.arange(1, n_categories + 1)
        successors = np.searchsorted(cdf, rng.random((n_categories, N_SUCCESSORS)), side="right")
        return cls(
            cdf,
            first_item,
            successors.astype(np.int32),
            rng.permutation(n_items) + 1,
            rng.permutation(n_categories) + 1,
        )

    def draw_categories(self, u: NDArray[np.float64]) -> NDArray[np.int32]:
        """Categories by popularity, from uniforms in [0, 1)."""
        return np.searchsorted(self.cdf, u, side="right").astype(np.int32)

    def draw_items(
        self,
        category: NDArray[np.int32],
        u: NDArray[np.float64],
        style: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Items of each category by (rank + 8)^-0.9, inverting the integral of that density.

        Args:
            category: int32 [n].
            u: uniforms in [0, 1), [n].
            style: [n]; 0 .. 7 moves the item to the nearest rank that is ``style`` modulo 8 (the
                user's hidden taste in this category); -1 leaves it.
        """
        first = self.first_item[category]
        size = self.first_item[category + 1] - first
        power = 1 - _ITEM_EXPONENT
        low = _ITEM_SHIFT**power
        high = (size + _ITEM_SHIFT) ** power
        rank = ((low + u * (high - low)) ** (1 / power) - _ITEM_SHIFT).astype(np.int64)
        rank = np.clip(rank, 0, size - 1)
        styled = rank - rank % N_STYLES + style
        rank = np.where((style >= 0) & (styled < size), styled, rank)
        return (first + rank).astype(np.int32)

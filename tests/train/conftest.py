"""A tiny data set in memory, with the methods that training and evaluation use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastrec.models import RankerConfig

Ids = NDArray[np.int64]


@dataclass
class FakeBatch:
    item: Ids
    category: Ids
    behaviour: Ids
    length: Ids
    cand_item: Ids
    cand_category: Ids
    label: Ids
    user: Ids

    def inputs(self) -> tuple[Ids, ...]:
        return (
            self.item,
            self.category,
            self.behaviour,
            self.length,
            self.cand_item,
            self.cand_category,
        )


class FakeDataset:
    """Users who return to their own few items: learnable, and not by popularity."""

    n_behaviours = 5

    def __init__(self, n_users: int = 96, n_items: int = 40, n_categories: int = 6) -> None:
        rng = np.random.default_rng(7)
        self.n_users, self.n_items, self.n_categories = n_users, n_items, n_categories
        self.history_length = 12
        self.item_category = rng.integers(1, n_categories, n_items).astype(np.int32)
        self.item_category[0] = 0
        own = rng.integers(1, n_items, (n_users, 3))
        self.events = [
            own[user][rng.integers(0, 3, rng.integers(5, 20))].astype(np.int64)
            for user in range(n_users)
        ]
        self.item_count = np.bincount(
            np.concatenate([e[:-2] for e in self.events]), minlength=n_items
        ).astype(np.int64)

    def num_examples(self, split: str) -> int:
        return self.n_users

    def _order(self, rng: np.random.Generator, shuffle: bool | None, limit: int | None) -> Ids:
        users = rng.permutation(self.n_users) if shuffle else np.arange(self.n_users)
        return users[:limit]

    def batches(
        self,
        split: str,
        *,
        batch_size: int,
        n_candidates: int = 50,
        negatives: str = "popularity",
        history_length: int | None = None,
        seed: int = 0,
        shuffle: bool | None = None,
        limit: int | None = None,
        exclude_seen: bool = False,
    ) -> Iterator[FakeBatch]:
        rng = np.random.default_rng(seed)
        size = history_length or self.history_length
        weight = self.item_count + 1.0 if negatives == "popularity" else np.ones(self.n_items)
        weight = np.where(np.arange(self.n_items) == 0, 0, weight)
        users = self._order(rng, shuffle, limit)
        for start in range(0, len(users), batch_size):
            part = users[start : start + batch_size]
            item = np.zeros((len(part), size), np.int64)
            length = np.zeros(len(part), np.int64)
            cand = rng.choice(self.n_items, (len(part), n_candidates), p=weight / weight.sum())
            label = rng.integers(0, n_candidates, len(part))
            for row, user in enumerate(part):
                events = self.events[user]
                end = {"test": len(events) - 1, "valid": len(events) - 2}.get(split)
                if end is None:
                    end = int(rng.integers(1, len(events) - 2))
                history = events[max(0, end - size) : end]
                item[row, : len(history)], length[row] = history, len(history)
                clash = cand[row] == events[end]
                cand[row][clash] = cand[row][clash] % (self.n_items - 1) + 1
                cand[row, label[row]] = events[end]
            yield FakeBatch(
                item,
                self.item_category[item].astype(np.int64),
                (item > 0).astype(np.int64),
                length,
                cand.astype(np.int64),
                self.item_category[cand].astype(np.int64),
                label.astype(np.int64),
                part.astype(np.int64),
            )

    def sequences(
        self, split: str, *, batch_size: int, max_length: int, seed: int, shuffle: bool
    ) -> Iterator[tuple[Ids, Ids, Ids]]:
        users = self._order(np.random.default_rng(seed), shuffle, None)
        for start in range(0, len(users), batch_size):
            part = users[start : start + batch_size]
            item = np.zeros((len(part), max_length), np.int64)
            target = np.zeros((len(part), max_length), np.int64)
            length = np.zeros(len(part), np.int64)
            for row, user in enumerate(part):
                events = self.events[user][:-2][-max_length - 1 :]
                length[row] = len(events) - 1
                item[row, : length[row]], target[row, : length[row]] = events[:-1], events[1:]
            yield item, length, target


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dataset() -> FakeDataset:
    return FakeDataset()


@pytest.fixture(scope="session")
def tiny(dataset: FakeDataset) -> RankerConfig:
    return RankerConfig(
        n_items=dataset.n_items,
        n_categories=dataset.n_categories,
        history_length=dataset.history_length,
        d=16,
        category_dim=8,
        ffn=32,
        tower=(24, 24),
    )

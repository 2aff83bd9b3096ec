"""User-item histories ("user item" lines in time order), split leave-one-out.

Of each user's n items the last is the test target, the one before it the validation target, and
the first n - 2 are for training. Users with fewer than three items are training data only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrec.errors import ArgumentError

Ids = NDArray[np.int64]
# So many batches are cut from users sorted by length: little padding, still mixed from epoch to
# epoch.
_BUCKET = 12


@dataclass(frozen=True)
class Batch:
    """Left-aligned histories: ``item`` int64 [B, L], ``length`` [B], ``target`` [B, L] or [B]."""

    item: Ids
    length: Ids
    target: Ids
    user: Ids


class Histories:
    """Every user's items in time order.

    Args:
        items: int64 [rows], ids from 1, users one after another.
        starts: int64 [users + 1], where each user's items start.
        max_length: longest history that a model sees.
    """

    def __init__(self, items: Ids, starts: Ids, max_length: int) -> None:
        if not len(items) or items.min() < 1:
            raise ArgumentError("items", "ids from 1", "none" if not len(items) else items.min())
        self.items, self.starts, self.max_length = items, starts, max_length
        self.n_items = int(items.max()) + 1  # row 0 is padding
        self.lengths = np.diff(starts)

    @classmethod
    def read(cls, path: str | Path, max_length: int = 200) -> Histories:
        """Read "user item" lines, a user's lines together and in time order.

        Raises:
            ArgumentError: no such file, not two integers a line, a user's lines not together.
        """
        path = Path(path)
        if not path.is_file():
            raise ArgumentError("path", "a file of 'user item' lines", str(path))
        try:
            rows = np.loadtxt(path, dtype=np.int64, ndmin=2)
        except ValueError as error:
            raise ArgumentError("path", "two integers a line", str(error)) from error
        if rows.ndim != 2 or rows.shape[1] != 2:
            raise ArgumentError("path", "two integers a line", f"shape {list(rows.shape)}")
        cuts = np.flatnonzero(np.diff(rows[:, 0])) + 1
        starts = np.concatenate(([0], cuts, [len(rows)]))
        if len(np.unique(rows[:, 0])) != len(starts) - 1:
            raise ArgumentError("path", "each user's lines together", "a user in several places")
        return cls(np.ascontiguousarray(rows[:, 1]), starts, max_length)

    @property
    def n_users(self) -> int:
        """Users in all."""
        return len(self.lengths)

    def num_examples(self, split: str) -> int:
        """Users that give at least one target in ``split``."""
        return int((self.lengths >= 3).sum())

    def users(self) -> Ids:
        """Users with a training, a validation and a test target."""
        return np.flatnonzero(self.lengths >= 3)

    def history(self, user: int, split: str) -> tuple[Ids, int]:
        """All items known before ``split``'s target, and that target."""
        end = int(self.starts[user + 1]) - (1 if split == "test" else 2)
        return self.items[self.starts[user] : end], int(self.items[end])

    def counts(self) -> Ids:
        """How often each item is in a training history, int64 [n_items]."""
        known = [self.history(user, "valid")[0] for user in self.users()]
        return np.bincount(np.concatenate(known), minlength=self.n_items)

    def training_tokens(self) -> float:
        """Mean number of targets of a user in a training epoch."""
        length = np.minimum(self.lengths[self.users()] - 3, self.max_length)
        return float(length.mean())

    def training(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """One epoch: every user once; of a long history a random window of ``max_length``.

        ``batch_size`` is the mean: of users alike in length, few long or many short ones make a
        batch, so that batches have about as many targets and each target weighs the same.
        """
        rng = np.random.default_rng(seed)
        users = rng.permutation(self.users())
        cut = np.minimum(self.lengths - 3, self.max_length)
        groups: list[Ids] = []
        for start in range(0, len(users), batch_size * _BUCKET):
            some = users[start : start + batch_size * _BUCKET]
            some = some[np.argsort(cut[some], kind="stable")]
            done = np.cumsum(cut[some])
            share = done[-1] / math.ceil(len(some) / batch_size)
            groups += np.split(some, np.searchsorted(done, np.arange(share, done[-1], share)))
        rng.shuffle(groups)  # type: ignore[arg-type]
        for group in groups:
            width = int(cut[group].max(initial=0))
            if width < 1:
                continue
            item = np.zeros((len(group), width), np.int64)
            target = np.zeros_like(item)
            for row, user in enumerate(group):
                n = int(cut[user])
                room = int(self.lengths[user]) - 3 - n
                first = int(self.starts[user]) + int(rng.integers(room + 1))
                item[row, :n] = self.items[first : first + n]
                target[row, :n] = self.items[first + 1 : first + n + 1]
            yield Batch(item, cut[group], target, group)

    def held_out(self, split: str, users: Ids, batch_size: int = 128) -> Iterator[Batch]:
        """``split``'s targets of ``users``, in order of length (little padding)."""
        gap = 1 if split == "test" else 2
        length = np.minimum(self.lengths[users] - gap, self.max_length)
        order = np.argsort(length, kind="stable")
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            item = np.zeros((len(some), int(length[some].max())), np.int64)
            target = np.zeros(len(some), np.int64)
            for row, index in enumerate(some):
                known, target[row] = self.history(users[index], split)
                n = int(length[index])
                item[row, :n] = known[len(known) - n :]
            yield Batch(item, length[some], target, users[some])

"""Memory-mapped sequences of one prepared folder, and the batches made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrec.data.batch import SequenceBatch
from fastrec.data.behaviours import BEHAVIOURS
from fastrec.data.idmap import MISSING_CATEGORY
from fastrec.data.original_ids import OriginalIds
from fastrec.data.sampling import NegativeSampler
from fastrec.data.storage import read_manifest
from fastrec.errors import ArgumentError, ArtifactError

Int64 = NDArray[np.int64]

SPLITS = ("train", "valid", "test")

_MIN_EVENTS_FOR_TARGETS = 3
_TARGETS = 2
# Negatives are drawn in chunks of this many examples, each with its own stream, so that the
# candidates of an example do not depend on the batch size.
_CHUNK = 1024
_ARRAYS = {
    "items": np.int32,
    "behaviours": np.uint8,
    "times": np.int64,
    "offsets": np.int64,
    "user_ids": np.int64,
    "item_ids": np.int64,
    "item_category": np.int32,
    "item_count": np.int64,
    "category_ids": np.int64,
}
# Beside the ids where the log's are text.
_TEXTS = {
    f"{role}_{name}": dtype
    for role in ("user", "item", "category")
    for name, dtype in (("text", np.uint8), ("text_offsets", np.int64))
}


@dataclass(frozen=True)
class _Examples:
    """user: index from 0; target: index into the event arrays; cand_item [n, m]; label [n]."""

    user: Int64
    target: Int64
    cand_item: Int64
    label: Int64


class SequenceDataset:
    """Sequences of a folder written by :func:`fastrec.data.prepare`; use :meth:`open`.

    Attributes:
        path: the folder.
        n_users: real users; dense user ids are 1 .. n_users.
        n_items, n_categories, n_behaviours: table rows, including row 0 (padding).
        history_length: the longest history the folder was made for (L).
        item_category: int32 [n_items], dense category of each item.
        item_count: int64 [n_items], events of each item in the train part of the log.
        behaviour_names: names of the behaviours 1, 2, ...
        user_ids, item_ids, category_ids: int64, dense id -> integer of the log or key of its text;
            row 0 is padding.
        users, catalogue, categories: the same as :class:`OriginalIds`, which turn dense ids into
            the log's and back, texts included.
        items, behaviours, times: int32, uint8, int64 [events]: all users' events, oldest first.
        offsets: int64 [n_users + 1]; events of user u (from 1) are offsets[u-1] .. offsets[u]-1.
        manifest: counts and options of prepare.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.items: NDArray[np.int32] = arrays["items"]
        self.behaviours: NDArray[np.uint8] = arrays["behaviours"]
        self.times: Int64 = arrays["times"]
        self.offsets: Int64 = arrays["offsets"]
        self.user_ids: Int64 = arrays["user_ids"]
        self.item_ids: Int64 = arrays["item_ids"]
        self.item_category: NDArray[np.int32] = arrays["item_category"]
        self.item_count: Int64 = arrays["item_count"]
        self.category_ids: Int64 = arrays["category_ids"]
        self.n_users = len(self.user_ids) - 1
        self.n_items = len(self.item_ids)
        self.n_categories = len(self.category_ids)
        self.behaviour_names: tuple[str, ...] = tuple(manifest.get("behaviours", BEHAVIOURS))
        self.n_behaviours = len(self.behaviour_names) + 1
        self.history_length = int(manifest["history_length"])
        self.users, self.catalogue, self.categories = (
            OriginalIds(
                arrays[f"{role}_ids"],
                arrays.get(f"{role}_text"),
                arrays.get(f"{role}_text_offsets"),
                MISSING_CATEGORY if role == "category" else None,
            )
            for role in ("user", "item", "category")
        )
        self._samplers: dict[str, NegativeSampler] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool | None = None) -> SequenceDataset:
        """Check the folder's manifest and map its arrays (no copy in memory).

        Args:
            path: a folder written by :func:`fastrec.data.prepare`.
            verify: True compares every file's CRC-32; False its size only; None the CRC-32 where
                the files add up to at most 64 MiB.

        Raises:
            DataError: no such folder, or no finished data set.
            ArtifactError: a file is missing, cut, altered or too new; names the file.
        """
        manifest = read_manifest(path, verify=verify)
        folder, arrays = Path(path), {}
        for name, dtype in {**_ARRAYS, **_TEXTS}.items():
            file = folder / f"{name}.npy"
            if name in _TEXTS and file.name not in manifest["files"]:
                continue
            if file.name not in manifest["files"]:
                raise ArtifactError(f"{folder}: its manifest does not list {file.name}")
            try:
                array = np.load(file, mmap_mode="r")
            except ValueError as error:
                raise ArtifactError(f"{file}: not a .npy file ({error})") from error
            if array.dtype != dtype or array.ndim != 1:
                got = f"{array.dtype} of rank {array.ndim}"
                raise ArtifactError(f"{file}: expected {np.dtype(dtype)} of rank 1, got {got}")
            arrays[name] = np.asarray(array)  # a plain view: indexing memmap objects is slower
        dataset = cls(folder, manifest, arrays)
        dataset._check_sizes()
        return dataset

    def _check_sizes(self) -> None:
        """Arrays must fit each other, so that no index made from them leaves its table."""
        offsets = f"{self.path / 'offsets.npy'}"
        if len(self.offsets) != self.n_users + 1 or int(self.offsets[-1]) != len(self.items):
            raise ArtifactError(f"{offsets}: does not fit user_ids.npy and items.npy")
        for name, values, size in (
            ("behaviours", self.behaviours, len(self.items)),
            ("times", self.times, len(self.items)),
            ("item_category", self.item_category, self.n_items),
            ("item_count", self.item_count, self.n_items),
        ):
            if len(values) != size:
                raise ArtifactError(
                    f"{self.path / name}.npy: has {len(values)} values, expected {size}"
                )

    def num_examples(self, split: str) -> int:
        """Examples of one pass over a split: one for each user who has enough events.

        ``train`` needs two events in the train part; ``valid`` and ``test`` three in all.
        """
        return len(self._users(_check_split(split)))

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
        targets_per_user: int = 1,
    ) -> Iterator[SequenceBatch]:
        """One pass over a split; the last batch may be smaller.

        ``test`` asks for each user's last event, ``valid`` for the last but one, ``train`` for an
        earlier one drawn at random (change ``seed`` from epoch to epoch). The history is what came
        before the target. The same arguments give the same examples, whatever the batch size.

        Args:
            split: ``train``, ``valid`` or ``test``.
            batch_size: B, >= 1.
            n_candidates: m; the positive and m - 1 distinct negatives. The positive's column is
                random. 1 gives the positive only.
            negatives: ``popularity`` (in proportion to ``item_count``) or ``uniform``.
            history_length: L of the batch, at most the data set's (the default).
            seed: >= 0.
            shuffle: random order of the users; by default for ``train`` only.
            limit: stop after this number of examples. Users are stored in the order of a hash, so
                the first ones are a fair sample.
            exclude_seen: no negative is among the user's stored events (targets included).
            targets_per_user: ``train`` only: targets drawn for each user, with replacement.

        Raises:
            ArgumentError: at the call for a bad argument; during the pass where a user leaves
                fewer than ``n_candidates - 1`` items to draw.
        """
        _check_split(split)
        length = self.history_length if history_length is None else history_length
        if not 1 <= length <= self.history_length:
            raise ArgumentError("history_length", f"1 .. {self.history_length}", length)
        for name, value in {
            "batch_size": batch_size,
            "n_candidates": n_candidates,
            "targets_per_user": targets_per_user,
        }.items():
            if value < 1:
                raise ArgumentError(name, ">= 1", value)
        if targets_per_user > 1 and split != "train":
            raise ArgumentError("targets_per_user", f"1 for split {split!r}", targets_per_user)
        _check_seed(seed)
        if limit is not None and limit < 0:
            raise ArgumentError("limit", ">= 0 or None", limit)
        if negatives not in self._samplers:
            self._samplers[negatives] = NegativeSampler(negatives, self.item_count)
        sampler = self._samplers[negatives]
        if n_candidates > sampler.n_drawable:
            raise ArgumentError(
                "n_candidates", f"<= {sampler.n_drawable} items that can be drawn", n_candidates
            )
        shuffle = split == "train" if shuffle is None else shuffle
        user, target = self._targets(split, seed, shuffle, targets_per_user)
        limit = len(user) if limit is None else min(limit, len(user))
        chunks = self._examples(
            split, user, target, sampler, n_candidates, seed, exclude_seen, limit
        )
        return (self._assemble(part, length) for part in _regroup(chunks, batch_size))

    def sequences(
        self,
        split: str,
        *,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Int64, Int64, Int64]]:
        """Whole sequences for next-item models: ``(item [B, L], length [B], target [B, L])``.

        ``train``: the train part; target[t] is the item after item[t]. ``valid``, ``test``: all
        that came before that split's event, which is the target of the last valid position; every
        other target is 0 (none). The latest ``max_length`` positions, left-aligned, int64.

        Args:
            split, batch_size, seed, shuffle: as for :meth:`batches`.
            max_length: L, >= 1; rows of users with fewer events are padded.
        """
        _check_split(split)
        _check_seed(seed)
        for name, value in {"batch_size": batch_size, "max_length": max_length}.items():
            if value < 1:
                raise ArgumentError(name, ">= 1", value)
        users = self._users(split)
        if split == "train" if shuffle is None else shuffle:
            users = np.random.default_rng([seed, SPLITS.index(split), 1]).permutation(users)
        starts = range(0, len(users), batch_size)
        return (self._next_items(split, users[i : i + batch_size], max_length) for i in starts)

    def _next_items(self, split: str, users: Int64, width: int) -> tuple[Int64, Int64, Int64]:
        last = self._split_end(split, users)  # event to predict at the last position
        first = np.maximum(self.offsets[users], last - width)
        length = last - first
        position = np.arange(width)
        valid = position < length[:, None]
        index = first[:, None] + position
        item = np.take(self.items, index, mode="clip").astype(np.int64) * valid
        target = np.take(self.items, index + 1, mode="clip").astype(np.int64)
        wanted = valid if split == "train" else position == length[:, None] - 1
        return item, length, target * wanted

    def _users(self, split: str) -> Int64:
        """Users (from 0) who have an example in the split."""
        events = np.diff(self.offsets)
        if split != "train":
            return np.flatnonzero(events >= _MIN_EVENTS_FOR_TARGETS)
        return np.flatnonzero(_train_events(events) >= 2)

    def _split_end(self, split: str, users: Int64) -> Int64:
        """Index of the split's last target of each user."""
        begin, end = self.offsets[users], self.offsets[users + 1]
        if split == "train":
            return begin + _train_events(end - begin) - 1
        return end - (1 if split == "test" else 2)

    def _targets(
        self, split: str, seed: int, shuffle: bool, targets_per_user: int
    ) -> tuple[Int64, Int64]:
        """(user from 0, event index of the target) of every example, in order."""
        rng = np.random.default_rng([seed, SPLITS.index(split), 0])
        users = self._users(split)
        if split == "train":
            users = np.repeat(users, targets_per_user)
            target = rng.integers(self.offsets[users] + 1, self._split_end(split, users) + 1)
        else:
            target = self._split_end(split, users)
        if shuffle:
            order = rng.permutation(len(users))
            users, target = users[order], target[order]
        return users, target

    def _examples(
        self,
        split: str,
        user: Int64,
        target: Int64,
        sampler: NegativeSampler,
        m: int,
        seed: int,
        exclude_seen: bool,
        limit: int,
    ) -> Iterator[_Examples]:
        """Candidates of each chunk of examples. A chunk is drawn whole even where ``limit`` cuts
        it, so that a limit changes no candidate."""
        for number, start in enumerate(range(0, limit, _CHUNK)):
            chunk = slice(start, start + _CHUNK)
            rng = np.random.default_rng([seed, SPLITS.index(split), 2, number])
            positive = self.items[target[chunk]].astype(np.int64)
            n = len(positive)
            cand, label = np.empty((n, m), np.int64), np.zeros(n, np.int64)
            cand[:, 0] = positive
            if m > 1:
                seen = self._stored_items(user[chunk]) if exclude_seen else None
                cand[:, 1:] = sampler.sample(rng, positive, m - 1, seen)
                label = rng.integers(0, m, n)
                rows = np.arange(n)
                cand[:, 0] = cand[rows, label]
                cand[rows, label] = positive
            yield _slice(_Examples(user[chunk], target[chunk], cand, label), 0, limit - start)

    def _stored_items(self, users: Int64) -> Int64:
        """int64 [n, S]: every stored item of each user, 0 where a user has fewer."""
        begin, end = self.offsets[users], self.offsets[users + 1]
        position = np.arange(self.history_length + _TARGETS)
        index = begin[:, None] + position
        return np.take(self.items, index, mode="clip").astype(np.int64) * (index < end[:, None])

    def _assemble(self, part: _Examples, width: int) -> SequenceBatch:
        first = np.maximum(self.offsets[part.user], part.target - width)
        length = part.target - first
        position = np.arange(width)
        valid = position < length[:, None]
        index = first[:, None] + position
        item = np.take(self.items, index, mode="clip") * valid  # [B, L] int32, 0 where padded
        behaviour = np.take(self.behaviours, index, mode="clip") * valid
        return SequenceBatch(
            item=item.astype(np.int64),
            category=self.item_category[item].astype(np.int64),
            behaviour=behaviour.astype(np.int64),
            length=length,
            cand_item=part.cand_item,
            cand_category=self.item_category[part.cand_item].astype(np.int64),
            label=part.label,
            user=part.user + 1,
        )


def _train_events(events: Int64) -> Int64:
    """Events of the train part: all but two, or all of a user too short for targets."""
    return np.where(events >= _MIN_EVENTS_FOR_TARGETS, events - _TARGETS, events)


def _check_split(split: str) -> str:
    if split not in SPLITS:
        raise ArgumentError("split", " or ".join(map(repr, SPLITS)), repr(split))
    return split


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ArgumentError("seed", ">= 0", seed)


def _regroup(chunks: Iterator[_Examples], batch_size: int) -> Iterator[_Examples]:
    """Chunks of any size -> batches of exactly ``batch_size`` (the last may be smaller)."""
    held: list[_Examples] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk.user)
        if count < batch_size:
            continue
        merged = _concatenate(held)
        whole = count - count % batch_size
        for start in range(0, whole, batch_size):
            yield _slice(merged, start, start + batch_size)
        held, count = ([_slice(merged, whole, count)], count - whole)
    if count:
        yield _concatenate(held)


def _concatenate(parts: list[_Examples]) -> _Examples:
    if len(parts) == 1:
        return parts[0]
    return _Examples(
        np.concatenate([part.user for part in parts]),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.cand_item for part in parts]),
        np.concatenate([part.label for part in parts]),
    )


def _slice(part: _Examples, start: int, stop: int) -> _Examples:
    cut = slice(start, stop)
    return _Examples(part.user[cut], part.target[cut], part.cand_item[cut], part.label[cut])

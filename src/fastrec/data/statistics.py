"""Lengths, sessions, returns and popularity of a log: what makes it easy or hard for a sequential
model.

The same table for a real log, a synthetic one and a prepared data set (of which only the stored
events count: the latest ones of each user).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastrec.data.behaviours import BEHAVIOURS
from fastrec.data.dataset import SequenceDataset
from fastrec.data.idmap import MISSING_CATEGORY
from fastrec.data.layout import ReadOptions
from fastrec.data.reader import LogReader, Source
from fastrec.data.sessions import SESSION_GAP
from fastrec.errors import ArgumentError, DataError

if TYPE_CHECKING:
    import polars as pl

Int64 = NDArray[np.int64]

_BACK = (8, 16, 32, 64, 100)
_LONG = 100


def read_log(
    source: Source,
    options: ReadOptions | None = None,
    tell: Callable[[str], None] | None = None,
) -> pl.DataFrame:
    """The good rows of a log of any layout, whole, in memory; every time is taken.

    Args:
        source: files, folders or patterns, as for :func:`fastrec.data.prepare`.
        options: how to read the log, where that should not be found by looking.
        tell: called with one line, how the log is read.

    Returns:
        Int64 user, item, category (of text ids: their keys) and time (seconds; the number of the
        row where the log has none), and the name of the behaviour.

    Raises:
        DataError, ArgumentError: as for :func:`fastrec.data.prepare`.
    """
    import polars as pl

    with LogReader(source, options) as reader:
        if tell is not None:
            tell(f"read as: {reader.layout.describe()}")
        frame = pl.concat(list(reader.frames()))
    names, table = reader.behaviours()
    words = pl.Series(["", *names]).gather(table[frame["behaviour"].to_numpy()])
    time = frame["time"] // reader.normaliser.ticks
    if "time" not in reader.layout.columns:
        time = pl.int_range(frame.height, dtype=pl.Int64, eager=True)
    category = frame["category"].fill_null(MISSING_CATEGORY)
    return frame.with_columns(category=category, behaviour=words, time=time)


@dataclass(frozen=True)
class _Events:
    """Flat, user after user, oldest first; all int64 [N]. ``user`` counts from 0; ``behaviour`` is
    an index into ``names``."""

    user: Int64
    item: Int64
    category: Int64
    behaviour: Int64
    time: Int64
    names: tuple[str, ...]

    @property
    def begins(self) -> Int64:
        """Index of each user's first event."""
        return np.flatnonzero(np.diff(self.user, prepend=-1))

    @property
    def position(self) -> Int64:
        """Event number within the user, from 0."""
        lengths = np.diff(np.append(self.begins, len(self.user)))
        return np.arange(len(self.user)) - np.repeat(self.begins, lengths)


def _from_dataset(dataset: SequenceDataset, max_users: int) -> _Events:
    end = int(dataset.offsets[min(max_users, dataset.n_users)])
    item = dataset.items[:end].astype(np.int64)
    lengths = np.diff(dataset.offsets[: max_users + 1])
    return _Events(
        np.repeat(np.arange(len(lengths)), lengths),
        item,
        dataset.item_category[item].astype(np.int64),
        dataset.behaviours[:end].astype(np.int64) - 1,
        dataset.times[:end].astype(np.int64),
        dataset.behaviour_names,
    )


def _from_frame(frame: pl.DataFrame, max_users: int) -> _Events:
    missing = {"user", "item", "category", "behaviour", "time"} - set(frame.columns)
    if missing:
        raise ArgumentError("log", f"columns {sorted(missing)} too", frame.columns)
    columns = [frame[n].to_numpy().astype(np.int64) for n in ("user", "item", "category")]
    codes, user = np.unique(columns[0], return_inverse=True)
    time = frame["time"].to_numpy().astype(np.int64)
    order = np.lexsort((time, user))
    order = order[user[order] < min(max_users, len(codes))]
    found = frame["behaviour"].unique().sort().to_list()
    names = (*BEHAVIOURS, *(name for name in found if name not in BEHAVIOURS))
    behaviour = frame["behaviour"].replace_strict({name: i for i, name in enumerate(names)})
    return _Events(
        user[order],
        columns[1][order],
        columns[2][order],
        behaviour.to_numpy().astype(np.int64)[order],
        time[order],
        names,
    )


def statistics(
    log: SequenceDataset | pl.DataFrame, *, max_users: int = 5000
) -> dict[str, float | int]:
    """The table.

    Args:
        log: a data set, or the rows of a log as :func:`read_log` gives them, in any order.
        max_users: users looked at, from the first.

    Returns:
        Name -> value. Shares are of 1. ``gap`` counts events back (1 = the event before);
        ``lru_rank_r`` is the share of events that go back to the category with r others (the
        current one included) visited since; ``back_w_item`` and ``back_w_category`` are the shares
        of events with at least 100 before them whose item or category lies among the last w.
        ``nan`` where no event qualifies.

    Raises:
        ArgumentError: a column is missing, or ``max_users`` < 1.
    """
    if max_users < 1:
        raise ArgumentError("max_users", ">= 1", max_users)
    if isinstance(log, SequenceDataset):
        events = _from_dataset(log, max_users)
    else:
        events = _from_frame(log, max_users)
    if not len(events.user):
        raise DataError("the log holds no event")
    item_gap = _gap(events.user, events.item)
    category_gap = _gap(events.user, events.category)
    return {
        **_sizes(events),
        **_categories(events, category_gap),
        **_items(events, item_gap, category_gap),
        **_sessions(events, category_gap),
        **_long_range(events, item_gap, category_gap),
        **_popularity(events),
        **_behaviours(events, item_gap),
    }


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _gap(user: Int64, value: Int64) -> Int64:
    """Events back to the user's last event with the same value; 0 where there is none."""
    order = np.lexsort((np.arange(len(user)), value, user))
    same = (np.diff(user[order]) == 0) & (np.diff(value[order]) == 0)
    gap = np.zeros(len(user), np.int64)
    gap[order[1:][same]] = np.diff(order)[same]
    return gap


def _lru_rank(gap: Int64) -> Int64:
    """Different values met since the last event with the same value (0: it was the event before,
    or there is none). One pass for each distance, over the events that reach so far back."""
    n = len(gap)
    following = np.zeros(n, np.int64)  # events ahead to the same value; 0 = never again
    later = np.flatnonzero(gap)
    following[later - gap[later]] = gap[later]
    following[following == 0] = n
    rank = np.zeros(n, np.int64)
    reach = np.flatnonzero(gap > 1)
    distance = 1
    while len(reach):
        # The event `distance` back counts if its value does not come again before this event.
        rank[reach] += following[reach - distance] > distance
        distance += 1
        reach = reach[gap[reach] > distance]
    return rank


def _sizes(events: _Events) -> dict[str, float | int]:
    lengths = np.bincount(events.user)
    pairs = np.unique(np.stack([events.user, events.category]), axis=1).shape[1]
    distinct = np.unique(np.stack([events.user, events.item]), axis=1).shape[1]
    return {
        "rows": len(events.user),
        "users": len(lengths),
        "items": len(np.unique(events.item)),
        "categories": len(np.unique(events.category)),
        "length_mean": float(lengths.mean()),
        "length_median": float(np.median(lengths)),
        "length_log_mean": float(np.log(lengths).mean()),
        "length_log_sd": float(np.log(lengths).std()),
        "length_over_100": _share(lengths > _LONG),
        "categories_per_user": pairs / len(lengths),
        "distinct_item_ratio": distinct / len(events.user),
        "events_per_user_category": len(events.user) / pairs,
    }


def _categories(events: _Events, gap: Int64) -> dict[str, float | int]:
    position = events.position
    follows = position > 0
    rank = _lru_rank(gap)
    values: dict[str, float | int] = {
        "category_same": _share(gap[follows] == 1),
        "category_seen": _share(gap[follows] > 0),
        "category_new": _share(gap[follows] == 0),
    }
    for low, high in ((0, 20), (20, 40), (60, 80), (100, 120), (180, 220)):
        inside = (position >= low) & (position < high)
        values[f"category_new_at_{low}_{high - 1}"] = _share(gap[inside] == 0)
    for r in (1, 2, 3, 4):
        values[f"category_lru_rank_{r}"] = _share(rank[follows] == r)
    values["category_lru_rank_10_up"] = _share(rank[follows] >= 10)
    return values


def _items(events: _Events, item_gap: Int64, category_gap: Int64) -> dict[str, float | int]:
    follows = events.position > 0
    values: dict[str, float | int] = {
        "item_seen": _share(item_gap[follows] > 0),
        "item_same_as_previous": _share(item_gap[follows] == 1),
    }
    for low, high in ((1, 1), (2, 8), (9, 16), (17, 64), (65, None)):
        inside = (category_gap >= low) & (category_gap <= (high or len(category_gap)))
        name = f"{low}_{high}" if high else f"{low}_up"
        values[f"item_seen_at_category_gap_{name}"] = _share(item_gap[inside] > 0)
    for low, high in ((2, 8), (9, 16), (17, 32), (33, 64), (65, None)):
        inside = (item_gap >= low) & (item_gap <= (high or len(item_gap)))
        values[f"item_gap_{low}_{high or 'up'}"] = _share(inside)
    return values


def _sessions(events: _Events, gap: Int64) -> dict[str, float | int]:
    begins = events.position == 0
    opens = begins | (np.diff(events.time, prepend=events.time[0]) > SESSION_GAP)
    lengths = np.diff(np.append(np.flatnonzero(opens), len(opens)))
    return {
        "session_length_median": float(np.median(lengths)),
        "session_length_mean": float(lengths.mean()),
        "session_length_p95": float(np.quantile(lengths, 0.95)),
        "sessions_per_user": len(lengths) / int(begins.sum()),
        "category_same_in_session": _share(gap[~opens] == 1),
        "category_same_at_session_start": _share(gap[opens & ~begins] == 1),
        "category_seen_in_session": _share(gap[~opens] > 0),
        "category_seen_at_session_start": _share(gap[opens & ~begins] > 0),
    }


def _long_range(events: _Events, item_gap: Int64, category_gap: Int64) -> dict[str, float | int]:
    late = events.position >= _LONG
    values: dict[str, float | int] = {"back_targets": int(late.sum())}
    for name, gap in (("item", item_gap[late]), ("category", category_gap[late])):
        for back in _BACK:
            values[f"back_{back}_{name}"] = _share((gap > 0) & (gap <= back))
    return values


def _popularity(events: _Events) -> dict[str, float | int]:
    def top(counts: Int64, n: int) -> float:
        return float(np.sort(counts)[::-1][: max(n, 1)].sum() / counts.sum())

    _, category = np.unique(events.category, return_counts=True)
    items, inverse, item = np.unique(events.item, return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([inverse, events.user]), axis=1)
    users_of_item = np.bincount(pairs[0], minlength=len(items))
    _, user_category = np.unique(
        np.stack([events.user, events.category]), axis=1, return_counts=True
    )
    first = np.unique(np.stack([events.user, events.category]), axis=1)[0]
    best = np.zeros(events.user[-1] + 1, np.int64)
    np.maximum.at(best, first, user_category)
    return {
        "category_share_top_1_percent": top(category, len(category) // 100),
        "category_share_top_10_percent": top(category, len(category) // 10),
        "category_share_top_10": top(category, 10),
        "item_singletons": _share(item == 1),
        "item_share_top_1_percent": top(item, len(item) // 100),
        "events_on_shared_items": _share(users_of_item[inverse] >= 2),
        "top_category_share_median": float(np.median(best / np.bincount(events.user))),
    }


def _behaviours(events: _Events, item_gap: Int64) -> dict[str, float | int]:
    values: dict[str, float | int] = {
        f"behaviour_{name}": _share(events.behaviour == code)
        for code, name in enumerate(events.names)
    }
    if "buy" in events.names:
        buys = events.behaviour == events.names.index("buy")
        values["buys_of_seen_items"] = _share(item_gap[buys] > 0)
    return values

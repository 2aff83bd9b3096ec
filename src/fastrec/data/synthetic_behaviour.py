"""Simulation of synthetic users: thousands of them in step, one event at a time.

State of each user, in rows sorted by falling number of events so that the active ones are a prefix:

- a slot for each category visited, in order of the first visit (category, visits, last visit,
  number of different items);
- ``recent``: the slots by recency, most recent first; a visit moves its slot to the front;
- the events so far. One is *live* while its item has not come again, so the r-th most recent
  item of a slot is the r-th live event of that slot from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastrec.data.hashing import mix64
from fastrec.data.synthetic_catalogue import N_STYLES, N_SUCCESSORS, SyntheticCatalogue

MAX_LENGTH = 540
MAX_SLOTS = 128

_STAY_A, _STAY_B = 2.4, 2.6  # Beta of a user's probability to stay in a category, mean 0.48
_STAY_AT_START = 0.13
_NEW_CAP, _NEW_DECAY, _NEW_AT_START, _NEW_INSIDE = 0.72, 0.30, 1.9, 0.68
_SUCCESSOR = 0.35
_RANK_EXPONENT, _VISITS_EXPONENT = 1.15, 0.35
_REPEAT = (0.32, 0.40, 0.30)  # own item again, by events since the category: 1, 2 to 8, more
_STYLED = 0.6
_ITEM_TRIES = 4
_RETURN_FROM, _RETURN_TO, _RETURN_ITEMS = 26 * 3600, 22 * 3600, 2


@dataclass(frozen=True)
class Habits:
    """The two knobs of the stress preset.

    Attributes:
        return_odds: factor on the odds of going back to a category older than ``old_events``.
        old_events: events since the last visit from which a category is old.
        daily_return: probability that a session replays two items of a day (22 to 26 h) before.
    """

    return_odds: float = 1.0
    old_events: int = 32
    daily_return: float = 0.04


STRESS = Habits(return_odds=6.0, daily_return=0.2)

_RANK_WEIGHT = np.arange(1, MAX_SLOTS + 1, dtype=np.float32) ** np.float32(-_RANK_EXPONENT)
_VISITS_WEIGHT = np.arange(MAX_LENGTH + 1, dtype=np.float32) ** np.float32(_VISITS_EXPONENT)
_HARMONIC = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, MAX_LENGTH + 1))])


class SyntheticBehaviour:
    """Events of one block of users.

    Args:
        catalogue: shared tables.
        rng: the block's generator.
        user: int64 [U], public ids (their hash gives the hidden styles).
        lengths: int64 [U], events of each user, falling, at most ``MAX_LENGTH``.
        times: int32 [U, T], seconds; opens: bool [U, T], session starts.
        habits: the stress knobs.
    """

    def __init__(
        self,
        catalogue: SyntheticCatalogue,
        rng: np.random.Generator,
        user: NDArray[np.int64],
        lengths: NDArray[np.int64],
        times: NDArray[np.int32],
        opens: NDArray[np.bool_],
        habits: Habits,
    ) -> None:
        n_users, n_events = times.shape
        self.catalogue, self.rng, self.habits = catalogue, rng, habits
        self.user, self.lengths, self.times, self.opens = user, lengths, times, opens
        self.stay = np.asarray(rng.beta(_STAY_A, _STAY_B, n_users))
        # One slot is always free: that is where a new category is put before it moves to the front.
        self.max_slots = min(MAX_SLOTS, len(catalogue.cdf)) - 1
        slots = (n_users, self.max_slots + 1)
        self.n_slots = np.zeros(n_users, np.int16)
        self.recent = np.zeros(slots, np.int16)
        self.slot_category = np.full(slots, -1, np.int32)
        self.slot_visits = np.zeros(slots, np.int16)
        self.slot_last = np.full(slots, -1, np.int16)
        self.slot_items = np.zeros(slots, np.int16)
        self.item = np.full((n_users, n_events), -1, np.int32)
        self.slot = np.full((n_users, n_events), -1, np.int16)
        self.live = np.full((n_users, n_events), -1, np.int16)
        self.seen = np.zeros((n_users, n_events), np.bool_)
        self.replay_left = np.zeros(n_users, np.int8)
        self.replay_from = np.zeros(n_users, np.int16)

    def run(self) -> None:
        """Fill ``item`` (index in the catalogue, [U, T]), ``slot`` and ``seen``."""
        for t in range(self.times.shape[1]):
            active = int(np.searchsorted(-self.lengths, -t, side="left"))
            self._step(t, active)

    def categories(self) -> NDArray[np.int32]:
        """int32 [U, T]: category of each event (meaningless beyond a user's length)."""
        return np.take_along_axis(self.slot_category, self.slot.clip(0).astype(np.int64), axis=1)

    def _step(self, t: int, a: int) -> None:
        rows = np.arange(a)
        opens = self.opens[:a, t]
        replay = self._replays(t, a, opens) if t else np.full(a, -1, np.int64)
        position, is_new = self._choose_category(t, a, opens, replay)
        slot = self.recent[rows, position]
        self._to_front(a, position, slot)
        source = self._choose_repeat(t, rows, slot, replay)
        item = np.where(source >= 0, self.item[rows, np.maximum(source, 0)], -1)
        self._draw_fresh(t, np.flatnonzero(source < 0), slot, item, source)
        self.n_slots[:a] += is_new
        again = source >= 0
        self.live[rows[again], source[again]] = -1
        self.slot_items[rows, slot] += ~again
        self.slot_visits[rows, slot] += 1
        self.slot_last[rows, slot] = t
        self.item[:a, t], self.slot[:a, t], self.live[:a, t] = item, slot, slot
        self.seen[:a, t] = again

    def _replays(self, t: int, a: int, opens: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Event to replay now for each user, or -1."""
        self.replay_left[:a][opens] = 0
        begin = np.flatnonzero(opens & (self.rng.random(a) < self.habits.daily_return))
        if len(begin):
            age = self.times[begin, t][:, None] - self.times[begin, :t]
            inside = (age >= _RETURN_TO) & (age <= _RETURN_FROM)
            count = inside.sum(axis=1)
            wanted = (self.rng.random(len(begin)) * count).astype(np.int64) + 1
            found = (np.cumsum(inside, axis=1) < wanted[:, None]).sum(axis=1)
            hit = count > 0
            self.replay_left[begin[hit]] = _RETURN_ITEMS
            self.replay_from[begin[hit]] = found[hit]
        source = np.full(a, -1, np.int64)
        pending = np.flatnonzero(self.replay_left[:a])
        if len(pending):
            event = self.replay_from[pending].astype(np.int64)
            self.replay_left[pending] -= 1
            self.replay_from[pending] += 1
            usable = (event < t) & (self.item[pending, event] != self.item[pending, t - 1])
            source[pending[usable]] = event[usable]
        return source

    def _choose_category(
        self, t: int, a: int, opens: NDArray[np.bool_], replay: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(position in ``recent``, whether it is a new category) of each user's next category."""
        u = self.rng.random(a)
        level = np.where(opens, _NEW_AT_START, _NEW_INSIDE)
        # The first event opens a session, so its level is above 1: surely new.
        p_new = np.minimum(_NEW_CAP if t else 1.0, level * max(t, 1) ** -_NEW_DECAY)
        p_new = np.where(self.n_slots[:a] < self.max_slots, p_new, 0.0)
        stay = np.where(opens, _STAY_AT_START, self.stay[:a])
        replaying = replay >= 0
        is_new = (u < p_new) & ~replaying
        goes_back = (u >= p_new + stay) & ~replaying & (self.n_slots[:a] > 1)
        position = np.zeros(a, np.int64)
        rows = np.flatnonzero(goes_back)
        if len(rows):
            position[rows] = self._draw_return(t, rows)
        rows = np.flatnonzero(is_new)
        if len(rows):
            position[rows], is_new[rows] = self._draw_new(rows)
        rows = np.flatnonzero(replaying)
        if len(rows):
            slot = self.slot[rows, replay[rows]]
            position[rows] = np.argmax(self.recent[rows] == slot[:, None], axis=1)
        return position, is_new

    def _draw_return(self, t: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position by rank^-1.15 x visits^0.35 among all but the most recent category."""
        count = self.n_slots[rows]
        width = int(count.max())
        slots = self.recent[rows, 1:width].astype(np.int64)
        flat = slots + (rows * self.slot_visits.shape[1])[:, None]
        weight = _VISITS_WEIGHT[np.take(self.slot_visits, flat)] * _RANK_WEIGHT[: width - 1]
        if self.habits.return_odds != 1:
            old = t - np.take(self.slot_last, flat) > self.habits.old_events
            weight[old] *= self.habits.return_odds
        weight[np.arange(1, width) >= count[:, None]] = 0
        cumulative = np.cumsum(weight, axis=1)
        wanted = self.rng.random(len(rows)) * cumulative[:, -1]
        position = (cumulative <= wanted[:, None]).sum(axis=1) + 1
        return np.minimum(position, count - 1)

    def _draw_new(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A category by popularity or succession, put in the free slot unless the user has been
        there already (then it is a return, which keeps popular categories popular)."""
        n = len(rows)
        count = self.n_slots[rows].astype(np.int64)
        width = int(count.max())
        current = self.slot_category[rows, self.recent[rows, 0]]
        owned = self.slot_category[rows, :width]
        category = self.catalogue.draw_categories(self.rng.random(n))
        follow = (self.rng.random(n) < _SUCCESSOR) & (count > 0)
        pick = self.rng.integers(0, N_SUCCESSORS, n)
        category = np.where(follow, self.catalogue.successors[current, pick], category)
        again = owned == category[:, None]
        todo = np.flatnonzero(again.any(axis=1))
        position = count.copy()
        if len(todo):
            slot = np.argmax(again[todo], axis=1)
            match = self.recent[rows[todo], :width] == slot[:, None]
            position[todo] = np.argmax(match, axis=1)
        is_new = np.ones(n, np.bool_)
        is_new[todo] = False
        fresh, free = rows[is_new], count[is_new]
        self.slot_category[fresh, free] = category[is_new]
        self.recent[fresh, free] = free
        return position, is_new

    def _to_front(self, a: int, position: NDArray[np.int64], slot: NDArray[np.int16]) -> None:
        width = int(position.max()) + 1
        before = self.recent[:a, : width - 1].copy()
        shifts = np.arange(1, width, dtype=np.int16) <= position.astype(np.int16)[:, None]
        np.copyto(self.recent[:a, 1:width], before, where=shifts)
        self.recent[:a, 0] = slot

    def _choose_repeat(
        self,
        t: int,
        rows: NDArray[np.int64],
        slot: NDArray[np.int16],
        replay: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Live event whose item comes again, or -1 for an item to be drawn."""
        count = self.slot_items[rows, slot].astype(np.int64)
        gap = t - self.slot_last[rows, slot]
        # Coming from this category, its most recent item is the previous event's: not again.
        skip = (gap == 1).astype(np.int64)
        p_repeat = np.where(gap == 1, _REPEAT[0], np.where(gap <= 8, _REPEAT[1], _REPEAT[2]))
        u = self.rng.random((2, len(rows)))
        source = np.full(len(rows), -1, np.int64)
        chosen = np.flatnonzero((u[0] < p_repeat) & (count > skip) & (replay < 0))
        if len(chosen):
            low, high = _HARMONIC[skip[chosen]], _HARMONIC[count[chosen]]
            rank = np.searchsorted(_HARMONIC, low + u[1, chosen] * (high - low), side="right")
            rank = np.clip(rank, skip[chosen] + 1, count[chosen])
            live = self.live[chosen, :t] == slot[chosen, None]
            nth = (count[chosen] - rank + 1).astype(np.int16)
            running = np.cumsum(live, axis=1, dtype=np.int16)
            source[chosen] = (running < nth[:, None]).sum(axis=1)
        again = np.flatnonzero(replay >= 0)
        if len(again):
            item = self.item[again, replay[again]]
            source[again] = self._live_event(t, again, item)
        return source

    def _live_event(
        self, t: int, rows: NDArray[np.int64], item: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Latest event with an item of each user, or -1."""
        match = self.item[rows, :t] == item[:, None]
        if not t:
            return np.full(len(rows), -1, np.int64)
        latest = t - 1 - np.argmax(match[:, ::-1], axis=1)
        return np.where(match[np.arange(len(rows)), latest], latest, -1)

    def _draw_fresh(
        self,
        t: int,
        rows: NDArray[np.int64],
        slot: NDArray[np.int16],
        item: NDArray[np.int32],
        source: NDArray[np.int64],
    ) -> None:
        """Draw ``item[rows]``; where one is the user's already, its event goes to ``source``."""
        category = self.slot_category[rows, slot[rows]]
        key = (self.user[rows].astype(np.uint64) << np.uint64(32)) | category.astype(np.uint64)
        taste = (mix64(key) % np.uint64(N_STYLES)).astype(np.int64)
        previous = self.item[rows, t - 1] if t else np.full(len(rows), -1, np.int32)
        todo = np.arange(len(rows))
        for _ in range(_ITEM_TRIES):
            u = self.rng.random((2, len(todo)))
            style = np.where(u[0] < _STYLED, taste[todo], -1)
            drawn = self.catalogue.draw_items(category[todo], u[1], style)
            item[rows[todo]] = drawn
            todo = todo[drawn == previous[todo]]
            if not len(todo):
                break
        if len(todo):
            # Rare: the neighbour in the category, which has at least two items.
            first, end = self.catalogue.first_item[category[todo] + np.array([[0], [1]])]
            item[rows[todo]] = first + (previous[todo] + 1 - first) % (end - first)
        source[rows] = self._live_event(t, rows, item[rows])

"""Batches: how requests are split, which sub-requests share a call, and when it starts."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np

from fastrec.serving.core.config import Batching
from fastrec.serving.core.latency import LatencyModel
from fastrec.serving.core.queues import PendingRequest, Queues, SubRequest
from fastrec.serving.core.signature import ModelSignature

_MOST_USERS = 64
# Cutting a request may take this multiple of its engine time uncut, so that others wait less.
_CHEAP = 1.1


class Batch:
    """Sub-requests that share a call.

    Args:
        subs: the members, at least one.
        queue: ``express`` or ``standard``.
        rows: candidates of each user that are scored in full.
        model: predicts the call's time.
        started: seconds on the scheduler's clock.
    """

    __slots__ = (
        "given_up",
        "padded",
        "predicted_s",
        "queue",
        "rows",
        "started",
        "subs",
        "users",
    )

    def __init__(
        self, subs: list[SubRequest], queue: str, rows: int, model: LatencyModel, started: float
    ) -> None:
        self.subs, self.queue, self.started = subs, queue, started
        self.padded = subs[0].key[0]
        self.users = sum([p.users for p in subs])
        self.rows = self.users * rows  # of each user
        self.predicted_s = model.predict(self.users, self.rows)
        self.given_up = False


class Batcher:
    """Splits and joins, within ``batch_s`` predicted seconds a call."""

    def __init__(self, config: Batching, signature: ModelSignature, batch_s: float) -> None:
        self.config, self.signature, self.batch_s = config, signature, batch_s
        own = signature.most("B")
        wanted = config.max_users or own or _MOST_USERS
        # Users, and candidates of a user, that one call takes.
        self.most_users = wanted if own is None else min(wanted, own)
        self._most_width = min(
            config.max_rows, signature.most(config.candidate_symbol) or config.max_rows
        )

    def padded(self, candidates: int) -> int:
        """Padded candidate count."""
        sizes = self.config.pad_to
        if not sizes or not self.signature.separable:
            return candidates
        i = bisect.bisect_left(sizes, candidates)
        return sizes[i] if i < len(sizes) else candidates

    def split(
        self,
        pending: PendingRequest,
        arrays: tuple[np.ndarray, ...],
        model: LatencyModel,
        engines: int,
    ) -> None:
        """Make a request's sub-requests: one, unless it must be cut or pieces finish sooner.

        Args:
            pending: the request; its ``subs`` are filled in.
            arrays: its inputs.
            model: predicted times of calls; each piece pays a call, and its users, again.
            engines: idle engines that the pieces can run on at once.
        """
        users, candidates = pending.users, pending.candidates
        height, width = self._shape(pending, model, max(engines, 1))
        whole = height >= users and width >= candidates
        for top in range(0, users, height):
            bottom = min(top + height, users)
            row = arrays if whole else self.signature.slice_users(arrays, top, bottom)
            chunk = []
            for left in range(0, candidates, width):
                right = min(left + width, candidates)
                cut = row
                if width < candidates:
                    cut = self.signature.slice_candidates(row, left, right)
                chunk.append(self._sub_request(pending, cut, bottom - top, right - left, model))
            pending.subs.append(chunk)
        pending.open_subs = pending.sub_count = sum([len(chunk) for chunk in pending.subs])

    def _shape(self, pending: PendingRequest, model: LatencyModel, engines: int) -> tuple[int, int]:
        """Users and candidates of each sub-request."""
        users, candidates = pending.users, max(pending.candidates, 1)
        fits = pending.rows <= self.config.max_rows and users <= self.most_users
        if fits and (candidates <= self._most_width or self.signature.keep):
            if pending.cost_s <= self.batch_s:
                return users, candidates
            uncut = users, candidates
        else:
            uncut = self._within(users, candidates, model, float("inf"))
        usual_s, alone_s = self._times(pending, uncut, model, engines)
        # Calls within the cap, so that others wait less, or a piece for each idle engine.
        for limit_s in (self.batch_s, alone_s / engines + model.beta + model.gamma * users):
            shape = self._within(users, candidates, model, limit_s)
            work_s, finish_s = self._times(pending, shape, model, engines)
            in_time = pending.guaranteed or finish_s <= pending.deadline - pending.arrival
            if finish_s < alone_s or (in_time and work_s <= _CHEAP * usual_s):
                return shape
        return uncut

    def _times(
        self, pending: PendingRequest, shape: tuple[int, int], model: LatencyModel, engines: int
    ) -> tuple[float, float]:
        """Engine seconds of all pieces of a shape, and until the last is done."""
        height, width = shape
        count = -(-pending.users // height) * -(-max(pending.candidates, 1) // width)
        each_s = model.predict(height, height * self.signature.deep(width))
        return count * each_s, -(-count // engines) * each_s

    def _within(
        self, users: int, candidates: int, model: LatencyModel, limit_s: float
    ) -> tuple[int, int]:
        """The largest users and candidates of a call that takes no longer than ``limit_s``."""
        width = max(self._most_candidates(candidates, model, limit_s), 1)
        return self._most_users_of(min(width, candidates), users, model, limit_s), width

    def _sub_request(
        self,
        pending: PendingRequest,
        arrays: tuple[np.ndarray, ...],
        users: int,
        candidates: int,
        model: LatencyModel,
    ) -> SubRequest:
        padded = self.padded(candidates)
        key = self.signature.key(arrays, padded)
        cost = model.predict(users, users * self.signature.deep(padded))
        return SubRequest(pending, arrays, users, candidates, key, cost)

    def _most_candidates(self, candidates: int, model: LatencyModel, limit_s: float) -> int:
        """Candidates of one user in one call."""
        if not self.signature.separable or candidates > self.signature.deep(candidates):
            # Pieces would each be screened for themselves, and more be kept.
            return candidates
        most = self._most_width
        room = limit_s - model.beta - model.gamma
        if model.alpha > 0 and limit_s < float("inf"):
            # Where users alone take the time, cutting candidates would only repeat that.
            most = min(most, max(int(room / model.alpha), candidates // 8, 1))
        if most >= candidates:
            return candidates
        sub_count = -(-candidates // most)
        return -(-candidates // sub_count)

    def _most_users_of(
        self, candidates: int, users: int, model: LatencyModel, limit_s: float
    ) -> int:
        """Users of one request in one call."""
        if not self.signature.joins:
            return users
        candidates = self.signature.deep(candidates)
        most = min(self.most_users, max(self.config.max_rows // max(candidates, 1), 1))
        each = model.gamma + model.alpha * candidates
        if each > 0 and limit_s < float("inf"):
            most = min(most, max(int((limit_s - model.beta) / each), 1))
        if most >= users:
            return users
        sub_count = -(-users // most)
        return -(-users // sub_count)

    def _room(self, padded: int, model: LatencyModel) -> int:
        """Users that fit one call, at ``padded`` candidates each."""
        if not self.config.enabled or not self.signature.joins:
            return 0
        rows = self.signature.deep(padded)
        each = model.gamma + model.alpha * rows
        most = min(self.most_users, self.config.max_rows // max(rows, 1))
        if each > 0:
            most = min(most, int((self.batch_s - model.beta) / each))
        return most

    def fill(
        self,
        seed: SubRequest,
        queues: Queues,
        model: LatencyModel,
        now: float,
        engines: int,
        too_late: Callable[[SubRequest], bool],
    ) -> list[SubRequest]:
        """Take the seed and what fits beside it, by the tiers' turns.

        No sub-request becomes late because of those that join it. Each of ``engines`` is left its
        share of the queue: what one call takes, the next idle engine cannot.

        Args:
            seed: the first member.
            queues: where the others wait.
            model: of the engine that runs the call.
            now: seconds on the scheduler's clock.
            engines: that take requests.
            too_late: drops a sub-request that can no longer be answered in time.
        """
        share = -(-queues.count // max(engines, 1))
        queues.take(seed)
        subs = [seed]
        padded = seed.key[0]
        each = model.gamma + model.alpha * self.signature.deep(padded)
        room = self._room(padded, model) - seed.users

        def in_time(deadline: float) -> float:
            return (deadline - now - model.beta) / each if each > 0 else room

        soonest = seed.pending.deadline
        if in_time(soonest) > seed.users:
            room = min(room, int(in_time(soonest)) - seed.users)
        if seed.solo or room <= 0 or share <= 1:
            return subs
        for sub in queues.heads(seed.key):
            if too_late(sub):
                continue
            deadline = sub.pending.deadline
            if deadline < soonest:
                taken = sum([p.users for p in subs])
                room = min(room, int(in_time(deadline)) - taken)
                soonest = deadline
            if sub.users > room:
                break
            queues.take(sub)
            subs.append(sub)
            room -= sub.users
            if room <= 0 or len(subs) >= share:
                break
        return subs

    def wait_until(
        self, seed: SubRequest, queues: Queues, model: LatencyModel, now: float
    ) -> float:
        """When to start a call that is not full: ``now``, unless it may be delayed.

        Args:
            seed: its first member.
            queues: where others wait.
            model: of the engine that runs the call.
            now: seconds on the scheduler's clock.
        """
        delay = self.config.max_delay_ms / 1e3
        if not delay or seed.solo or not self.config.enabled or not self.signature.joins:
            return now
        room = self._room(seed.key[0], model)
        if queues.count >= room:
            return now
        full_s = model.predict(room, room * self.signature.deep(seed.key[0]))
        return min(seed.pending.arrival + delay, seed.pending.deadline - 1.5 * full_s)

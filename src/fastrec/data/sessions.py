"""Times of synthetic events: sessions with the hour and day profile of the real log."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TAOBAO_WINDOW = (1511539200, 1512316799)
"""2017-11-25 00:00:00 to 2017-12-03 23:59:59 in UTC+8, as seconds since 1970: the days that
Taobao's published log covers. It also holds a few rows with negative and year-2037 times."""

DAY = 86_400
SESSION_GAP = 1_800
"""Seconds without an event that end a session."""

# Shares of session starts by day (25 November to 3 December 2017) and by hour (UTC+8), and the
# log-normal of the gaps inside a session, measured on the first 983 users of the published log.
_DAYS = (0.1003, 0.103, 0.1049, 0.104, 0.1078, 0.1076, 0.1079, 0.133, 0.1316)
_HOURS = (
    *(0.024, 0.0113, 0.0057, 0.0045, 0.0042, 0.0073, 0.0179, 0.0294),
    *(0.0397, 0.048, 0.0561, 0.0548, 0.0538, 0.0591, 0.0529, 0.0583),
    *(0.055, 0.0536, 0.0524, 0.0624, 0.0696, 0.0723, 0.0633, 0.0445),
)
_GAP_MU, _GAP_SIGMA = 4.03, 1.36
_SIZE_SCALE, _SIZE_MU, _SIZE_SIGMA = 3.0, -0.15, 1.25
_COLUMNS = 64


def draw_sessions(
    rng: np.random.Generator, lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Times and session starts of all events of users with the given numbers of events.

    Returns:
        Seconds since the window's start, int32, and whether the event opens a session, bool; both
        flat, user after user, in time order. Sessions lie at least half an hour apart.
    """
    user, size = _draw_sizes(rng, lengths)
    n_events = int(lengths.sum())
    opens = np.zeros(n_events, np.bool_)
    first_event = np.cumsum(size) - size
    opens[first_event] = True
    gap = rng.lognormal(_GAP_MU, _GAP_SIGMA, n_events)
    gap = np.clip(gap, 1, SESSION_GAP - 1).astype(np.int64)
    gap[opens] = 0
    inside = np.cumsum(gap)
    session = np.repeat(np.arange(len(size)), size)
    inside -= inside[first_event][session]  # seconds since the session's start
    duration = inside[first_event + size - 1] + SESSION_GAP + 1
    start = _spread(_draw_starts(rng, user), duration, user)
    return (start[session] + inside).astype(np.int32), opens


def _draw_sizes(
    rng: np.random.Generator, lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(user, events) of each session, in order; a user's last session is cut to fit."""
    sizes = np.zeros((len(lengths), 0), np.int64)
    while True:
        more = _SIZE_SCALE * rng.lognormal(_SIZE_MU, _SIZE_SIGMA, (len(lengths), _COLUMNS))
        sizes = np.concatenate([sizes, np.ceil(more).astype(np.int64)], axis=1)
        ends = np.cumsum(sizes, axis=1)
        if (ends[:, -1] >= lengths).all():
            break
    begins = ends - sizes
    used = begins < lengths[:, None]
    user = np.nonzero(used)[0]
    return user, np.minimum(sizes, lengths[:, None] - begins)[used]


def _draw_starts(rng: np.random.Generator, user: NDArray[np.int64]) -> NDArray[np.int64]:
    """Start of each session in seconds, ascending within a user."""
    n = len(user)
    days, hours = np.cumsum(_DAYS), np.cumsum(_HOURS)
    day = np.searchsorted(days, rng.random(n) * days[-1], side="right")
    hour = np.searchsorted(hours, rng.random(n) * hours[-1], side="right")
    start = day * DAY + hour * 3600 + rng.integers(0, 3600, n)
    # `user` ascends, so sorting (user, start) as one integer leaves the users where they are.
    return np.sort(user << 32 | start) & 0xFFFFFFFF


def _spread(
    start: NDArray[np.int64], duration: NDArray[np.int64], user: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Starts moved no further than needed so that start[i] + duration[i] <= start[i + 1] within a
    user and the last session ends in the window: push later ones on, then pull earlier ones back.
    """
    end = TAOBAO_WINDOW[1] - TAOBAO_WINDOW[0]
    # With `before` = what a user's earlier sessions last, the rule reads: start - before must not
    # fall. A huge offset for each user keeps the running maximum from crossing users.
    total = np.cumsum(duration)
    opens = np.flatnonzero(np.diff(user, prepend=-1))
    counts = np.diff(np.append(opens, len(user)))
    before = total - duration
    before -= np.repeat(before[opens], counts)
    offset = user << 32
    pushed = np.maximum.accumulate(start - before + offset) - offset + before
    after = np.repeat(total[opens + counts - 1], counts) - (total - duration)
    # `after`: what this and the user's later sessions last (half an hour more than the events do).
    return np.maximum(np.minimum(pushed, end - after), 0)

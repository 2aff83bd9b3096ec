"""Synthetic logs with the statistics of Taobao's, in its five-column format.

The model is in ``synthetic_behaviour.py``, ``synthetic_catalogue.py`` and ``sessions.py``;
``docs/data.md`` compares its logs with the real one. Users come in fixed blocks, each with its own
random stream, so a log depends on the arguments alone.
"""

from __future__ import annotations

import dataclasses
import os
import time as clock
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec.data.behaviours import BEHAVIOURS
from fastrec.data.layout import require_polars
from fastrec.data.reader import Progress
from fastrec.data.sessions import TAOBAO_WINDOW, draw_sessions
from fastrec.data.synthetic_behaviour import MAX_LENGTH, STRESS, Habits, SyntheticBehaviour
from fastrec.data.synthetic_catalogue import SyntheticCatalogue
from fastrec.errors import ArgumentError
from fastrec.files import atomic_write

if TYPE_CHECKING:
    import polars as pl

BLOCK_USERS = 8192

_LENGTH_MU, _LENGTH_SIGMA, _MIN_LENGTH = 4.24, 0.926, 5
# Shares of buy, cart and fav: on an item of the user's past, and on a new one; the rest is pv.
_ACTIONS = (("buy", 0.052, 0.011), ("cart", 0.085, 0.045), ("fav", 0.035, 0.025))


@dataclass(frozen=True)
class Preset:
    """Sizes of a synthetic log: real users, items and categories."""

    n_users: int
    n_items: int
    n_categories: int


PRESETS = {
    "demo": Preset(3_000, 1_000, 50),
    "small": Preset(3_000, 20_000, 300),
    "medium": Preset(20_000, 50_000, 1_000),
    "taobao": Preset(100_000, 4_162_024, 9_439),
}


@dataclass(frozen=True)
class GenerateReport:
    """Counts of one :func:`generate`; ``items`` and ``categories`` are the sizes drawn from."""

    out: str
    preset: str
    stress: bool
    seed: int
    users: int
    items: int
    categories: int
    events: int
    out_bytes: int
    seconds: float
    events_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def generate(
    out_csv: str | os.PathLike[str],
    *,
    preset: str = "demo",
    stress: bool = False,
    n_users: int | None = None,
    n_items: int | None = None,
    n_categories: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> GenerateReport:
    """Write a synthetic log: ``user,item,category,behaviour,time`` lines without a header, grouped
    by user and in time order. The same arguments give the same bytes (with one numpy and one CPU
    type: the last bit of a power may differ between them). An existing file is replaced, once the
    new one is complete.

    Args:
        out_csv: the file to write.
        preset: ``demo`` (3,000 users, 1,000 items, 50 categories), ``small`` (3,000, 20,000, 300),
            ``medium`` (20,000, 50,000, 1,000) or ``taobao`` (100,000, 4,162,024, 9,439).
        stress: six times the odds of going back to a category older than 32 events and five
            times the daily returns: a model that sees only the recent past loses more.
        n_users, n_items, n_categories: override the preset's sizes; at least 1 user, 8 categories
            and 2 items for each category.
        seed: >= 0.
        progress: called with ("generate", users done, users).

    Raises:
        ArgumentError: unknown preset or sizes out of range.
    """
    require_polars()
    if preset not in PRESETS:
        raise ArgumentError("preset", " or ".join(map(repr, PRESETS)), repr(preset))
    if seed < 0:
        raise ArgumentError("seed", ">= 0", seed)
    sizes = PRESETS[preset]
    n_users = sizes.n_users if n_users is None else n_users
    if not 1 <= n_users < 1 << 31:
        raise ArgumentError("n_users", "1 .. 2^31 - 1", n_users)
    n_items = sizes.n_items if n_items is None else n_items
    n_categories = sizes.n_categories if n_categories is None else n_categories
    out = Path(out_csv).absolute()
    if out.is_dir() or not out.parent.is_dir():
        raise ArgumentError("out_csv", "a file name in an existing folder", f"'{out_csv}'")
    started = clock.monotonic()
    catalogue = SyntheticCatalogue.make(n_items, n_categories, seed)
    habits = STRESS if stress else Habits()
    events = 0
    with atomic_write(out) as draft, draft.open("wb") as file:
        for number, first in enumerate(range(0, n_users, BLOCK_USERS)):
            n = min(BLOCK_USERS, n_users - first)
            frame = _block(catalogue, np.random.default_rng([seed, 1, number]), first, n, habits)
            frame.write_csv(file, include_header=False)
            events += frame.height
            if progress:
                progress("generate", first + n, n_users)
    seconds = clock.monotonic() - started
    return GenerateReport(
        out=str(out_csv),
        preset=preset,
        stress=stress,
        seed=seed,
        users=n_users,
        items=n_items,
        categories=n_categories,
        events=events,
        out_bytes=out.stat().st_size,
        seconds=seconds,
        events_per_s=events / max(seconds, 1e-9),
    )


def _block(
    catalogue: SyntheticCatalogue, rng: np.random.Generator, first: int, n: int, habits: Habits
) -> pl.DataFrame:
    """The events of users first + 1 .. first + n."""
    import polars as pl

    lengths = np.exp(rng.normal(_LENGTH_MU, _LENGTH_SIGMA, n)).round().astype(np.int64)
    lengths = lengths.clip(_MIN_LENGTH, MAX_LENGTH)
    order = np.argsort(-lengths, kind="stable")
    user, lengths = order + first + 1, lengths[order]
    present = np.arange(lengths[0]) < lengths[:, None]
    times, opens = np.zeros(present.shape, np.int32), np.zeros(present.shape, np.bool_)
    times[present], opens[present] = draw_sessions(rng, lengths)
    simulated = SyntheticBehaviour(catalogue, rng, user, lengths, times, opens, habits)
    simulated.run()
    back = np.argsort(user)
    kept = present[back]
    seen = simulated.seen[back][kept]
    u = rng.random(len(seen))
    behaviour = np.full(len(seen), BEHAVIOURS["pv"] - 1, np.uint8)
    low = np.zeros(len(seen))
    for name, if_seen, if_fresh in _ACTIONS:
        high = low + np.where(seen, if_seen, if_fresh)
        behaviour[(u >= low) & (u < high)] = BEHAVIOURS[name] - 1
        low = high
    names = pl.Series(list(BEHAVIOURS), dtype=pl.String)
    return pl.DataFrame(
        {
            "user": np.repeat(user[back], lengths[back]),
            "item": catalogue.item_label[simulated.item[back][kept]],
            "category": catalogue.category_label[simulated.categories()[back][kept]],
            "behaviour": names.gather(behaviour),
            "time": times[back][kept].astype(np.int64) + TAOBAO_WINDOW[0],
        }
    )

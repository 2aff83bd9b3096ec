from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrec.data import SequenceDataset, prepare
from fastrec.data.statistics import _gap, _lru_rank, read_log, statistics
from fastrec.errors import ArgumentError, DataError


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=60))
def test_gaps_and_ranks_are_those_of_the_definition(events: list[tuple[int, int]]) -> None:
    events.sort(key=lambda event: event[0])
    user, value = (np.array(column) for column in zip(*events, strict=True))
    gap = _gap(user, value)
    rank = _lru_rank(gap)
    for i in range(len(events)):
        past = [v for u, v in events[:i] if u == user[i]][::-1]
        if value[i] in past:
            back = past.index(value[i])
            assert gap[i] == back + 1
            assert rank[i] == len(set(past[:back]))
        else:
            assert gap[i] == rank[i] == 0


def test_a_small_log_by_hand() -> None:
    t0 = 1511539200
    frame = pl.DataFrame(
        {
            "user": [1, 1, 1, 1, 2],
            "item": [10, 11, 10, 30, 10],
            "category": [1, 1, 1, 3, 1],
            "behaviour": ["pv", "pv", "buy", "cart", "pv"],
            "time": [t0, t0 + 10, t0 + 20, t0 + 4000, t0],
        }
    )
    values = statistics(frame.sample(fraction=1.0, shuffle=True, seed=1))
    assert (values["rows"], values["users"], values["items"], values["categories"]) == (5, 2, 3, 2)
    assert values["category_same"] == 2 / 3
    assert values["category_new"] == 1 / 3
    assert values["item_seen"] == 1 / 3
    assert values["sessions_per_user"] == 1.5
    assert values["session_length_median"] == 1
    assert values["category_same_at_session_start"] == 0
    assert values["events_on_shared_items"] == 3 / 5
    assert values["top_category_share_median"] == (3 / 4 + 1) / 2
    assert values["buys_of_seen_items"] == 1
    assert np.isnan(values["back_8_item"])
    assert statistics(frame, max_users=1)["rows"] == 4


def test_a_data_set_gives_the_statistics_of_its_log(demo_log: Path, tmp_path: Path) -> None:
    prepare(demo_log, tmp_path / "out", max_history=538)  # the longest user has 540 events
    of_dataset = statistics(SequenceDataset.open(tmp_path / "out"))
    of_log = statistics(read_log(demo_log))
    assert of_dataset.keys() == of_log.keys()
    for name, value in of_log.items():
        assert of_dataset[name] == pytest.approx(value), name


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="category"):
        statistics(pl.DataFrame({"user": [1], "item": [1]}))
    with pytest.raises(ArgumentError, match="max_users"):
        statistics(pl.DataFrame(), max_users=0)
    with pytest.raises(DataError, match="no such file"):
        read_log(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("nothing\n")
    with pytest.raises(DataError, match="no delimiter"):
        read_log(tmp_path / "bad.csv")

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastrec.data import SequenceDataset, generate, generation, prepare
from fastrec.data.sessions import SESSION_GAP, draw_sessions
from fastrec.data.statistics import read_log, statistics
from fastrec.data.synthetic_catalogue import SyntheticCatalogue
from fastrec.errors import ArgumentError

# The published log's first 983 users (44 rows outside the window included or not: no digit below
# changes) and how far the generator may be off. Where a tolerance is more than sampling noise of
# 1,000 users (about 2 % of a share, 3 % of a size that the few longest users decide), it says why.
REAL = {
    "length_median": (74, 8),  # log-normal: 69.4; the real lengths are a little less skewed
    "length_log_mean": (4.24, 0.07),
    "length_log_sd": (0.926, 0.05),
    "length_over_100": (0.37, 0.06),
    "categories_per_user": (24.4, 2.0),
    "distinct_item_ratio": (0.757, 0.02),
    "events_per_user_category": (4.18, 0.4),
    "category_same": (0.412, 0.02),
    "category_seen": (0.768, 0.02),
    "category_new": (0.232, 0.02),
    "category_new_at_0_19": (0.435, 0.03),
    "category_new_at_20_39": (0.272, 0.03),
    "category_new_at_60_79": (0.209, 0.03),
    "category_new_at_100_119": (0.175, 0.03),
    "category_lru_rank_1": (0.119, 0.02),
    "category_lru_rank_2": (0.049, 0.01),
    "category_lru_rank_3": (0.033, 0.006),
    "category_lru_rank_4": (0.025, 0.006),
    "category_lru_rank_10_up": (0.064, 0.015),
    "item_seen": (0.245, 0.02),
    "item_same_as_previous": (0, 0),
    "item_seen_at_category_gap_1_1": (0.277, 0.03),
    "item_seen_at_category_gap_2_8": (0.404, 0.04),
    "item_seen_at_category_gap_9_16": (0.334, 0.04),
    "item_seen_at_category_gap_17_64": (0.317, 0.04),
    "item_seen_at_category_gap_65_up": (0.262, 0.10),  # the model repeats at one rate beyond 8
    "item_gap_2_8": (0.145, 0.02),
    "item_gap_9_16": (0.031, 0.006),
    "item_gap_17_32": (0.027, 0.006),
    "item_gap_33_64": (0.022, 0.006),
    "item_gap_65_up": (0.021, 0.010),  # as above
    "session_length_median": (3, 0),
    "session_length_mean": (6.0, 0.6),
    "session_length_p95": (22, 4),
    "sessions_per_user": (17.1, 1.7),
    "category_same_in_session": (0.465, 0.02),
    "category_same_at_session_start": (0.130, 0.02),
    "category_seen_in_session": (0.810, 0.02),
    "category_seen_at_session_start": (0.546, 0.03),
    "back_8_item": (0.142, 0.025),
    "back_16_item": (0.175, 0.025),
    "back_32_item": (0.207, 0.025),
    "back_64_item": (0.244, 0.025),
    "back_100_item": (0.271, 0.025),
    "back_8_category": (0.641, 0.02),
    "back_16_category": (0.700, 0.02),
    "back_32_category": (0.757, 0.02),
    "back_64_category": (0.806, 0.02),
    "back_100_category": (0.833, 0.02),
    "category_share_top_1_percent": (0.434, 0.03),
    "category_share_top_10_percent": (0.780, 0.02),
    "category_share_top_10": (0.261, 0.03),
    "item_singletons": (0.731, 0.05),
    "item_share_top_1_percent": (0.071, 0.02),
    "events_on_shared_items": (0.246, 0.07),  # styles spread the popular items over more
    "top_category_share_median": (0.238, 0.09),  # known: real users focus more on one category
    "behaviour_pv": (0.8971, 0.01),
    "behaviour_cart": (0.0545, 0.005),
    "behaviour_fav": (0.0274, 0.004),
    "behaviour_buy": (0.0210, 0.004),
    "buys_of_seen_items": (0.605, 0.05),
}


@pytest.fixture(scope="module")
def taobao(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    path = tmp_path_factory.mktemp("taobao") / "log.csv"
    generate(path, preset="taobao", n_users=1000)
    return read_log(path)


def test_statistics_are_those_of_the_real_log(taobao: pl.DataFrame) -> None:
    values = statistics(taobao)
    off = {
        name: (values[name], wanted, tolerance)
        for name, (wanted, tolerance) in REAL.items()
        if not abs(values[name] - wanted) <= tolerance
    }
    assert not off


def test_the_real_log_itself_is_the_table(real_file: Callable[[str], Path]) -> None:
    values = statistics(read_log(real_file("UserBehavior_head_100k.csv")))
    off = {
        name: (values[name], wanted)
        for name, (wanted, _) in REAL.items()
        if abs(values[name] - wanted) > max(0.002, 0.006 * wanted)  # the table is rounded
    }
    assert not off
    assert round(values["categories_per_user"], 1) == 24.4


def test_rows_are_well_formed_and_ordered(taobao: pl.DataFrame) -> None:
    assert taobao["user"].is_sorted()
    assert taobao["user"].n_unique() == 1000
    steps = taobao.select(pl.col("time").diff().over("user"))["time"].drop_nulls()
    assert (steps >= 0).all()
    assert taobao["time"].is_between(1511539200, 1512316799).all()
    assert taobao["item"].is_between(1, 4_162_024).all()
    assert taobao["category"].is_between(1, 9_439).all()
    assert taobao.group_by("item").agg(pl.col("category").n_unique())["category"].max() == 1
    lengths = taobao.group_by("user").len()["len"]
    assert (int(lengths.min()), int(lengths.max())) >= (5, 5)  # type: ignore[arg-type]
    assert int(lengths.max()) <= 540  # type: ignore[arg-type]


def test_stress_makes_old_history_matter_more(tmp_path: Path) -> None:
    values = {}
    for stress in (False, True):
        path = tmp_path / f"{stress}.csv"
        report = generate(path, preset="small", n_users=600, stress=stress)
        assert report.stress is stress
        values[stress] = statistics(read_log(path))
    for back in (8, 16, 32):
        name = f"back_{back}_category"
        assert values[True][name] < values[False][name] - 0.05
    # What is gone from the recent past is found further back, not lost.
    lost = values[False]["back_100_category"] - values[True]["back_100_category"]
    assert lost < 0.03


def test_same_seed_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BLOCK_USERS", 100)
    done: list[tuple[str, int, int]] = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        generate(
            tmp_path / name,
            n_users=250,
            seed=seed,
            progress=lambda *now: done.append(now),
        )
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert done[:3] == [("generate", n, 250) for n in (100, 200, 250)]
    # A user's events depend on the seed and the sizes, not on how many users follow the block.
    generate(tmp_path / "d", n_users=100, seed=5)
    assert a.startswith((tmp_path / "d").read_bytes())


@pytest.mark.parametrize(("preset", "sizes"), [(n, s) for n, s in generation.PRESETS.items()])
def test_presets_are_what_is_documented(
    tmp_path: Path, preset: str, sizes: generation.Preset
) -> None:
    documented = {
        "demo": (3_000, 1_000, 50),
        "small": (3_000, 20_000, 300),
        "medium": (20_000, 50_000, 1_000),
        "taobao": (100_000, 4_162_024, 9_439),
    }
    assert (sizes.n_users, sizes.n_items, sizes.n_categories) == documented[preset]
    if preset == "taobao":
        return
    report = generate(tmp_path / "log.csv", preset=preset, n_users=40)
    assert (report.items, report.categories) == documented[preset][1:]
    assert prepare(tmp_path / "log.csv", tmp_path / "out", strict=True).rows == report.events


def test_smallest_worlds(tmp_path: Path) -> None:
    generate(tmp_path / "log.csv", n_users=50, n_items=16, n_categories=8)
    values = statistics(read_log(tmp_path / "log.csv"))
    assert values["item_same_as_previous"] == 0
    assert values["items"] <= 16
    generate(tmp_path / "one.csv", n_users=1)
    prepare(tmp_path / "one.csv", tmp_path / "one")
    assert SequenceDataset.open(tmp_path / "one").n_users == 1


def test_an_interrupted_run_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("old")

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(path, n_users=10, progress=interrupt)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("log.csv", "old")]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("preset", "huge"),
        ("seed", -1),
        ("n_users", 0),
        ("n_items", 15),
        ("n_categories", 7),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: expected"):
        generate(tmp_path / "log.csv", **{argument: value})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="out_csv"):
        generate(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sessions_lie_apart_even_when_a_user_has_no_room_to_spare() -> None:
    lengths = np.array([540, 1, 540, 5])
    for seed in range(3):
        seconds, opens = draw_sessions(np.random.default_rng(seed), lengths)
        ends = np.cumsum(lengths)
        for begin, end in zip(ends - lengths, ends, strict=True):
            steps = np.diff(seconds[begin:end])
            assert opens[begin]
            assert (steps[opens[begin + 1 : end]] > SESSION_GAP).all()
            assert (steps[~opens[begin + 1 : end]] < SESSION_GAP).all()
            assert (steps >= 0).all()
        assert seconds.min() >= 0
        assert seconds.max() <= 9 * 86_400 - 1


def test_every_category_has_items_in_proportion() -> None:
    catalogue = SyntheticCatalogue.make(1000, 50, 0)
    sizes = np.diff(catalogue.first_item)
    assert sizes.sum() == 1000
    assert sizes.min() >= 2
    assert sorted(catalogue.item_label) == list(range(1, 1001))
    u = np.linspace(0, 1, 100, endpoint=False)
    for category in (0, 49):
        for style in (-1, 0, 7):
            items = catalogue.draw_items(np.full(100, category, np.int32), u, np.full(100, style))
            assert items.min() >= catalogue.first_item[category]
            assert items.max() < catalogue.first_item[category + 1]

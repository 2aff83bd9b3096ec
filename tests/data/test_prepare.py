from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data import (
    BEHAVIOURS,
    TAOBAO_WINDOW,
    ReadOptions,
    SequenceDataset,
    preparation,
    prepare,
)
from fastrec.errors import ArgumentError, DataError, MissingDependencyError

T0, T1 = TAOBAO_WINDOW
Row = tuple[int, int, int, str, int]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def sequences(dataset: SequenceDataset) -> dict[int, list[tuple[int, int, str, int]]]:
    """Raw user -> [(raw item, raw category, behaviour, time)], as stored."""
    names = {code: name for name, code in BEHAVIOURS.items()}
    found = {}
    for user in range(dataset.n_users):
        part = slice(int(dataset.offsets[user]), int(dataset.offsets[user + 1]))
        items = dataset.items[part]
        found[int(dataset.user_ids[user + 1])] = [
            (int(item), int(category), names[int(behaviour)], int(time))
            for item, category, behaviour, time in zip(
                dataset.item_ids[items],
                dataset.category_ids[dataset.item_category[items]],
                dataset.behaviours[part],
                dataset.times[part],
                strict=True,
            )
        ]
    return found


def expected(rows: list[Row], keep: int) -> dict[int, list[tuple[int, int, str, int]]]:
    """The same by definition: stable by time in each user, the latest ``keep``."""
    category: dict[int, int] = {}
    for _, item, row_category, _, _ in rows:
        category[item] = min(category.get(item, row_category), row_category)
    found: dict[int, list[tuple[int, int, str, int]]] = {}
    for user, item, _, behaviour, time in sorted(rows, key=lambda row: row[4]):
        found.setdefault(user, []).append((item, category[item], behaviour, time))
    return {user: events[-keep:] for user, events in found.items()}


ID = st.one_of(st.integers(-3, 12), st.sampled_from([2**63 - 1, -(2**63), 10**15]))
ROWS = st.lists(
    st.tuples(
        ID,
        st.one_of(st.integers(-3, 12), st.sampled_from([10**15, -(10**15)])),
        st.integers(-2, 5),
        st.sampled_from(sorted(BEHAVIOURS)),
        st.integers(T0, T0 + 6),
    ),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=40)
@given(
    rows=ROWS,
    max_history=st.integers(1, 5),
    block_bytes=st.sampled_from([64, 300, 1 << 20]),
    slice_rows=st.sampled_from([3, 10_000]),
    per_bucket=st.sampled_from([2, 10_000]),
)
def test_sequences_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    max_history: int,
    block_bytes: int,
    slice_rows: int,
    per_bucket: int,
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "BLOCK_BYTES", block_bytes)
        patch.setattr(preparation, "_SLICE_ROWS", slice_rows)
        patch.setattr(preparation, "_ROWS_PER_BUCKET", per_bucket)
        report = prepare(write(folder / "log.csv", rows), folder / "out", max_history=max_history)
    dataset = SequenceDataset.open(folder / "out", verify=True)
    assert sequences(dataset) == expected(rows, max_history + 2)
    assert report.rows == report.kept == len(rows)
    lengths = {user: sum(row[0] == user for row in rows) for user, *_ in rows}
    targets = sum(2 for n in lengths.values() if n >= 3)
    assert dataset.item_count.sum() == len(rows) - targets
    assert (dataset.item_count >= 0).all()
    assert dataset.item_count[0] == dataset.item_category[0] == 0
    assert report.users_with_test == dataset.num_examples("test") == targets // 2


@settings(deadline=None, max_examples=15)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_any_row_order_gives_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], seed: int
) -> None:
    # Equal times of one user are broken by the order of the rows, so they must differ here.
    rows = [(*row[:4], T0 + i) for i, row in enumerate(rows)]
    folder = tmp_path_factory.mktemp("order")
    prepare(write(folder / "a.csv", rows), folder / "a", max_history=3)
    random.Random(seed).shuffle(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "BLOCK_BYTES", 200)
        patch.setattr(preparation, "_ROWS_PER_BUCKET", 5)
        prepare(write(folder / "b.csv", rows), folder / "b", max_history=3)
    names = sorted(path.name for path in (folder / "a").iterdir())
    assert names == sorted(path.name for path in (folder / "b").iterdir())
    for name in names:
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes(), name


BAD = {
    "fields": "1,2,3,pv",
    "user": "x,2,3,pv,1511539200",
    "item": "1,,3,pv,1511539200",
    "category": "1,2,x,pv,1511539200",
    "behaviour": "1,2,3,,1511539200",
    "time": "1,2,3,pv,yesterday",
    "window": "1,2,3,pv,-7",
}
TAOBAO = ReadOptions(
    columns={"user": 1, "item": 2, "category": 3, "behaviour": 4, "time": 5},
    ids="integer",
    time_unit="s",
)


@settings(deadline=None, max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(["good", "", *BAD]), min_size=1, max_size=30),
    block_bytes=st.sampled_from([50, 1 << 20]),
    crlf=st.booleans(),
    header=st.booleans(),
    final=st.booleans(),
)
def test_nothing_is_lost_and_strict_names_the_line(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[str],
    block_bytes: int,
    crlf: bool,
    header: bool,
    final: bool,
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    good = "1,2,3,pv,1511539200"
    lines = [*(["user,item,category,type,time"] if header else []), good]
    lines += [good if kind == "good" else BAD.get(kind, "") for kind in kinds]
    end = "\r\n" if crlf else "\n"
    path = folder / "log.csv"
    path.write_bytes((end.join(lines) + (end if final else "")).encode())
    first_bad = next((i for i, line in enumerate(lines, 1) if line in BAD.values()), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "BLOCK_BYTES", block_bytes)
        report = prepare(path, folder / "out", options=TAOBAO, window=TAOBAO_WINDOW)
        out = folder / "strict"
        if first_bad is None:
            prepare(path, out, options=TAOBAO, window=TAOBAO_WINDOW, strict=True)
        else:
            with pytest.raises(DataError) as caught:
                prepare(path, out, options=TAOBAO, window=TAOBAO_WINDOW, strict=True)
            assert str(caught.value).startswith(f"{path}:{first_bad}: ")
    rejected = {name: n for name, n in report.rejected.items() if n}
    assert rejected == {kind: kinds.count(kind) for kind in BAD if kind in kinds}
    for kind, line in BAD.items():
        if kind in kinds:
            place = f"{path}:{lines.index(line) + 1}: "
            assert report.first_rejected[kind].startswith(place)
    assert report.kept == 1 + kinds.count("good")
    assert report.rows == report.kept + sum(report.rejected.values())
    # A blank last line without a line end is no line at all.
    assert report.blank_lines == kinds.count("") - (not final and kinds[-1] == "")


def test_window_none_takes_every_time(tmp_path: Path) -> None:
    rows: list[Row] = [(1, i, 1, "pv", t) for i, t in enumerate((2**31, -5, T0, 2145916800, -5))]
    log = write(tmp_path / "log.csv", rows)
    assert prepare(log, tmp_path / "out", window=None).kept == 5
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.times.tolist() == [-5, -5, T0, 2145916800, 2**31]
    assert dataset.item_ids[dataset.items].tolist() == [1, 4, 2, 3, 0]
    report = prepare(log, tmp_path / "other", window=(-5, -5))
    assert (report.kept, report.rejected["window"]) == (2, 3)


def test_equal_times_keep_the_order_of_the_file_across_slices(tmp_path: Path) -> None:
    rows: list[Row] = [(user, i, 1, "pv", T0) for i in range(40) for user in (5, 6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_SLICE_ROWS", 7)
        patch.setattr(preparation, "BLOCK_BYTES", 100)
        prepare(write(tmp_path / "log.csv", rows), tmp_path / "out", max_history=8)
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.item_ids[dataset.items].tolist() == list(range(30, 40)) * 2


def test_user_item_format_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("7 30\n7 10\n9 10\n7 20\n9 30\n7 10\n")
    report = prepare(path, tmp_path / "out", max_history=2)
    dataset = SequenceDataset.open(tmp_path / "out")
    found = {user: [item for item, *_ in rows] for user, rows in sequences(dataset).items()}
    assert found == {7: [30, 10, 20, 10], 9: [10, 30]}
    assert (dataset.n_categories, report.categories) == (2, 1)
    assert set(dataset.behaviours.tolist()) == {1}
    assert report.window is None


def test_items_under_two_categories_are_counted_and_get_the_smaller(tmp_path: Path) -> None:
    rows: list[Row] = [(1, 5, 9, "pv", T0), (1, 5, 4, "pv", T0 + 1), (1, 6, 9, "pv", T0 + 2)]
    report = prepare(write(tmp_path / "log.csv", rows), tmp_path / "out")
    assert report.item_category_conflicts == 1
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.category_ids[dataset.item_category].tolist() == [0, 4, 9]


@pytest.mark.parametrize("content", ["", "\n\n", "user,item,category,behaviour,time\n"])
def test_a_log_without_a_usable_row_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=r"log\.csv: no usable row"):
        prepare(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.csv"]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", [(1, 1, 1, "pv", T0)])
    with pytest.raises(ArgumentError, match="container"):
        prepare(log, tmp_path / "out", options=ReadOptions(container="excel"))
    with pytest.raises(ArgumentError, match="max_history"):
        prepare(log, tmp_path / "out", max_history=0)
    with pytest.raises(ArgumentError, match="window"):
        prepare(log, tmp_path / "out", window=(2, 1))
    with pytest.raises(ArgumentError, match="out: expected a path in an existing folder"):
        prepare(log, tmp_path / "missing" / "out")
    with pytest.raises(DataError, match="no such file"):
        prepare(tmp_path / "none.csv", tmp_path / "out")


def test_without_polars_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(MissingDependencyError, match=r"fastrec-kernels\[data\]"):
        prepare(tmp_path / "log.csv", tmp_path / "out")


@pytest.mark.parametrize("stage", ["read", "sort"])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, stage: str) -> None:
    log = write(tmp_path / "log.csv", [(1, 1, 1, "pv", T0), (1, 2, 1, "pv", T0 + 1)])

    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(log, tmp_path / "out", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.csv"]
    prepare(log, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        prepare(log, tmp_path / "out", max_history=3, force=True, progress=interrupt)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert SequenceDataset.open(tmp_path / "out", verify=True).history_length == 100


def test_a_killed_run_is_never_taken_for_a_finished_one(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", [(1, 1, 1, "pv", T0), (1, 2, 1, "pv", T0 + 1)])
    script = """
import os, signal, sys
from fastrec.data import prepare
def kill(stage, done, total):
    if stage == "sort" and done == total:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(sys.argv[1], sys.argv[2], progress=kill)
"""
    command = [sys.executable, "-c", script, str(log), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    (left,) = (path for path in tmp_path.iterdir() if path != log)
    assert left.name.startswith(".out.partial-")
    for path in (tmp_path / "out", left):
        with pytest.raises(DataError):
            SequenceDataset.open(path)
    prepare(log, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]

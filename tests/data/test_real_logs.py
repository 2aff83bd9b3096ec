"""Facts of real logs; skipped where this machine does not have them (set FASTREC_DATA)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastrec.data import TAOBAO_WINDOW, SequenceDataset, prepare

Finder = Callable[[str], Path]


def test_head_of_the_taobao_log(real_file: Finder, tmp_path: Path) -> None:
    log = real_file("UserBehavior_head_100k.csv")
    report = prepare(log, tmp_path / "out", window=TAOBAO_WINDOW)
    assert {name: n for name, n in report.rejected.items() if n} == {"window": 44}
    assert (report.rows, report.kept) == (100_001, 99_957)
    assert (report.users, report.categories) == (983, 3_128)
    assert report.users_with_test == 983
    whole = prepare(log, tmp_path / "whole", max_history=1000)
    assert (whole.users, whole.items, whole.categories) == (983, 64_467, 3_128)
    assert whole.kept == whole.stored_events == 100_001
    dataset = SequenceDataset.open(tmp_path / "out")
    batch = next(dataset.batches("test", batch_size=983))
    assert int(batch.length.max()) == 100
    assert int(batch.behaviour.max()) == 4


def test_movielens(real_file: Finder, tmp_path: Path) -> None:
    report = prepare(real_file("ml-1m.txt"), tmp_path / "out", max_history=200, strict=True)
    assert (report.users, report.items, report.rows) == (6_040, 3_416, 999_611)
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.item_count.sum() == 999_611 - 2 * 6_040
    assert dataset.num_examples("test") == 6_040


def test_beauty(real_file: Finder, tmp_path: Path) -> None:
    report = prepare(real_file("Beauty.txt"), tmp_path / "out", max_history=50)
    assert (report.users, report.items, report.rows) == (52_204, 57_289, 394_908)
    assert report.users - report.users_with_test == 1_706

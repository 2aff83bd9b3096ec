from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastrec.data import ReadOptions, open_or_prepare, prepare
from fastrec.errors import ArgumentError, DataError


def _log(path: Path, items: int = 9) -> Path:
    lines = [f"{user}\t{user + k}\tx{k}" for user in range(4) for k in range(items)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_log_is_prepared_once_and_again_when_it_changes(tmp_path: Path) -> None:
    log, folder, told = _log(tmp_path / "log.tsv"), tmp_path / "run" / "data", list[str]()
    options = ReadOptions(columns={"user": 1, "item": 3})
    for _ in range(2):
        dataset = open_or_prepare(log, folder, options=options, tell=told.append)
        assert dataset.catalogue.to_original([1])[0] in {f"x{k}" for k in range(9)}
    assert told == [
        "read as: tsv, no header, user=1, item=3 (text), no time: order of the rows, not used: 2"
    ]
    assert (
        open_or_prepare(log, folder, options=ReadOptions(columns={"user": 1, "item": 2})).n_items
        == 13
    )
    _log(log, items=5)
    os.utime(log, ns=(1, 1))
    assert open_or_prepare(log, folder, options=options).n_items == 6
    # A run that was cut leaves no data set; it is made again.
    (folder / "manifest.json").unlink()
    with pytest.raises(ArgumentError, match="something else"):
        open_or_prepare(log, folder, options=ReadOptions(columns={"user": 1, "item": 2}))


def test_prepared_folders_are_opened_as_they_are(tmp_path: Path) -> None:
    prepare(
        _log(tmp_path / "log.tsv"),
        tmp_path / "out",
        options=ReadOptions(columns={"user": 1, "item": 2}),
    )
    assert open_or_prepare(tmp_path / "out", tmp_path / "unused").n_users == 4
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ArgumentError, match="columns: expected none for a folder that is prepared"):
        open_or_prepare(tmp_path / "out", tmp_path / "x", options=ReadOptions(columns={"user": 1}))
    with pytest.raises(DataError, match="is a data set that is prepared already"):
        prepare(tmp_path / "out", tmp_path / "again")
    with pytest.raises(DataError, match="no such file"):
        open_or_prepare(tmp_path / "none.csv", tmp_path / "x")

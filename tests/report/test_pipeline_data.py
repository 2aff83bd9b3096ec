"""``table1 --data``: any log, prepared once for a state of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrec.errors import ArgumentError
from fastrec.report.pipeline import dataset_of, model_config
from fastrec.report.settings import Table1Settings
from fastrec.report.store import Store

pytest.importorskip("polars")


def _log(folder: Path, users: int) -> Path:
    folder.mkdir(exist_ok=True)
    for part in range(2):
        lines = [
            f"k{k}\tu{user}\tevent{k % 6}\t{1511600000 + k}"
            for user in range(part, users, 2)
            for k in range(7)
        ]
        (folder / f"part-{part}.tsv").write_text("\n".join(["sku\twho\tevent\tts", *lines]) + "\n")
    return folder


def test_columns_and_behaviours_reach_the_model(tmp_path: Path) -> None:
    settings = Table1Settings.make(data=_log(tmp_path / "log", 10), columns="user=who")
    store = Store(tmp_path / "out")
    dataset, about = dataset_of(settings, store, lambda *_: None)
    assert (about["users"], about["items"], about["rows"], about["rejected"]) == (10, 7, 70, {})
    assert about["read_as"].startswith("tsv, header, user=who (text), item=sku (text)")
    assert model_config(settings, dataset).n_behaviours == 6
    again, _ = dataset_of(settings, store, lambda *_: None)
    assert store.reused == ["data"]
    assert again.n_users == 10
    _log(tmp_path / "log", 12)
    assert dataset_of(settings, store, lambda *_: None)[1]["users"] == 12


def test_columns_are_for_logs() -> None:
    with pytest.raises(ArgumentError, match="columns: expected none without a log"):
        Table1Settings.make(columns="user=1")

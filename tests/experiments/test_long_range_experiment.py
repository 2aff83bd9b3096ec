"""The long-range experiment on a log small enough for a test: the slice, resuming, the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from experiments.long_range import (
    PATTERNS,
    Setup,
    app,
    far_targets,
    open_world,
    read_world,
    run_world,
)
from typer.testing import CliRunner

from fastrec.train import evaluate

SMALL = Setup(
    users=60, items=200, categories=10, d=16, ffn=16, tower=(16,), epochs=1, tune_epochs=1
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_world("stress", folder / "stress", SMALL, progress=False)
    return folder


def test_the_long_slice_is_what_it_says(runs: Path) -> None:
    data = open_world(runs / "stress", "stress", SMALL)
    far = far_targets(data, near=4)
    rows = 0
    for batch in data.batches("test", batch_size=7, n_candidates=2, shuffle=False):
        for row in range(len(batch)):
            column = batch.label[row]
            wanted = batch.cand_item[row, column], batch.cand_category[row, column]
            n = batch.length[row]
            alike = [
                wanted[0] == item or wanted[1] == category
                for item, category in zip(batch.item[row, :n], batch.category[row, :n], strict=True)
            ]
            assert far[rows] == (any(alike[:-4]) and not any(alike[-4:]))
            rows += 1
    assert rows == len(far)
    assert 0 < far.sum() < len(far)


def test_the_slice_and_the_ranks_speak_of_the_same_users(runs: Path) -> None:
    data = open_world(runs / "stress", "stress", SMALL)
    model = SMALL.model(data)
    users = evaluate(model, data, intervals=False).users
    order = [b.user for b in data.batches("test", batch_size=512, n_candidates=2, shuffle=False)]
    np.testing.assert_array_equal(users, np.concatenate(order))


def test_what_is_done_is_not_done_again_and_is_reported(runs: Path, tmp_path: Path) -> None:
    files = sorted((runs / "stress").glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    run_world("stress", runs / "stress", SMALL, progress=False)
    assert [file.stat().st_mtime_ns for file in files] == before
    found = read_world(runs / "stress")
    assert found is not None
    assert [row["variant"] for row in found["variants"]] == ["before fine-tuning", *PATTERNS]
    assert not found["missing"]
    done = CliRunner().invoke(app, ["report", "--runs", str(runs), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "long_range.md").read_text()
    assert "Not measured: the small world." in text
    written = json.loads((tmp_path / "long_range.json").read_text())
    assert written["stress"]["setup"] == SMALL.to_dict()
    assert (tmp_path / "long_range.png").stat().st_size > 5_000
    earlier = tmp_path / "long_range.json"
    earlier.write_text(json.dumps({"small": written["stress"]}))
    done = CliRunner().invoke(app, ["report", "--runs", str(runs), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert list(json.loads(earlier.read_text())) == ["small", "stress"]  # the earlier one stays
    other = written["stress"] | {"setup": written["stress"]["setup"] | {"epochs": 99}}
    earlier.write_text(json.dumps({"small": other}))
    done = CliRunner().invoke(app, ["report", "--runs", str(runs), "--out", str(tmp_path)])
    assert done.exit_code == 2


def test_a_report_needs_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", "--runs", str(tmp_path), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "run this first" in done.output

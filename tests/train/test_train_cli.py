"""``fastrec train`` on the real data room: generate, prepare, train, resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fastrec.errors import ArgumentError, ArtifactError
from fastrec.models import Ranker, SASRec
from fastrec.train import load_model

pytest.importorskip("polars")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder of 60 users who come back to their own items."""
    from fastrec.data import prepare

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("log")
    rows = [
        f"{user},{item},{item % 7 + 1},pv,{1511600000 + 60 * step}"
        for user in range(1, 61)
        for own in [rng.integers(1, 80, 4)]
        for step, item in enumerate(own[rng.integers(0, 4, 9)])
    ]
    (root / "log.csv").write_text("\n".join(rows) + "\n")
    prepare(root / "log.csv", root / "data", max_history=8)
    return root / "data"


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    from fastrec.train.cli import train

    app = typer.Typer()
    app.command()(train)
    return app


def run(app: typer.Typer, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_report_and_resume(app: typer.Typer, folder: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    common = ["--epochs", 2, "--candidates", 4, "--quiet", "--json", report]
    shown = run(app, folder, out, *common, "--max-steps", 1)
    assert "hit_rate_10" in shown
    first = json.loads(report.read_text())
    assert first["train"]["steps"] == 1
    run(app, folder, out, *common, "--resume")
    second = json.loads(report.read_text())
    assert second["train"]["steps"] == 2
    assert [test["protocol"] for test in second["test"]] == ["candidates", "full"]
    assert "hit_rate_50" not in second["test"][0]["metrics"]
    assert "hit_rate_50" in second["test"][1]["metrics"]
    assert isinstance(load_model(out), Ranker)


def test_train_sasrec(app: typer.Typer, folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", "sasrec", "--epochs", 1, "--quiet", "--exclude-seen"]
    run(app, folder, tmp_path / "out", *arguments)
    model = load_model(tmp_path / "out")
    assert isinstance(model, SASRec)


def test_bad_input_is_a_typed_error(app: typer.Typer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        run(app, folder, tmp_path / "new", "--resume", "--quiet")
    with pytest.raises(ArgumentError, match="lr"):
        run(app, folder, tmp_path / "new", "--lr", "-1", "--quiet")


def test_a_log_is_prepared_on_the_way(app: typer.Typer, tmp_path: Path) -> None:
    """A log in a layout of its own, with a catalogue smaller than the 50 candidates."""
    lines = [
        f"{1511600000 + 60 * k}|u{user}|{(user + k) % 9}" for user in range(30) for k in range(6)
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    out, report = tmp_path / "out", tmp_path / "report.json"
    common = ["--max-steps", 1, "--quiet", "--json", report, "--columns", "user=2,item=3"]
    shown = run(app, tmp_path / "log.txt", out, *common)
    assert "user=2 (text), item=3, time=1 (s)" in shown
    tests = json.loads(report.read_text())["test"]
    assert [(test["n_candidates"], test["n_users"]) for test in tests] == [(9, 30), (9, 30)]
    assert (out / "data" / "manifest.json").is_file()
    with pytest.raises(ArgumentError, match="columns: expected none"):
        run(app, out / "data", out, *common)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastrec.data.cli import app
from fastrec.errors import ArgumentError, DataError

runner = CliRunner()


def run(*arguments: str | Path) -> str:
    result = runner.invoke(app, [str(value) for value in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_generate_prepare_stats(tmp_path: Path) -> None:
    log, out, report = tmp_path / "log.csv", tmp_path / "out", tmp_path / "report.json"
    text = run("generate", log, "--users", "60", "--seed", "3", "--json", report)
    assert "Generated" in text
    generated = json.loads(report.read_text())
    assert (generated["users"], generated["preset"], generated["seed"]) == (60, "demo", 3)
    text = run("prepare", log, out, "--max-history", "30", "--strict", "--json", report)
    assert "refused: window" in text
    prepared = json.loads(report.read_text())
    assert prepared["rows"] == prepared["kept"] == generated["events"]
    assert prepared["rejected"] == {"fields": 0, "integer": 0, "behaviour": 0, "window": 0}
    for source in (log, out):
        assert "item seen" in run("stats", source, "--json", report)
        assert json.loads(report.read_text())["users"] == 60


def test_windows_and_formats(tmp_path: Path) -> None:
    log, report = tmp_path / "log.csv", tmp_path / "report.json"
    log.write_text("1,2,3,pv,5\n1,2,3,pv,-5\n1,3,3,pv,1511539200\n")
    for options, kept in (([], 1), (["--all-times"], 3), (["--window", "0", "9"], 1)):
        run("prepare", log, tmp_path / "out", "--force", "--json", report, *options)
        assert json.loads(report.read_text())["kept"] == kept
    log.write_text("1 2\n1 3\n")
    run("prepare", log, tmp_path / "out", "--force", "--format", "user-item", "--json", report)
    assert json.loads(report.read_text())["items"] == 2


def test_errors_reach_the_caller_typed(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("1,2,3,pv,1511539200\n1,2,3\n")
    with pytest.raises(DataError, match=r"log\.csv:2: wrong number of fields"):
        run("prepare", log, tmp_path / "out", "--strict")
    with pytest.raises(ArgumentError, match="--window"):
        run("prepare", log, tmp_path / "out", "--all-times", "--window", "1", "2")


def test_the_room_imports_lightly() -> None:
    script = (
        "import sys, fastrec.data, fastrec.data.cli\n"
        "assert not {'polars', 'torch', 'numpy', 'rich.progress'} & set(sys.modules)\n"
        "import fastrec.data.dataset\n"
        "assert not {'polars', 'torch'} & set(sys.modules)\n"
        "from fastrec.data import prepare, generate\n"
        "assert callable(prepare) and callable(generate)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script.replace("fastrec.data.preparation = None\n", "")], check=True
    )

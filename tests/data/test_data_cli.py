from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastrec.data import SequenceDataset
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
    assert "read as: csv, no header, user=1, item=2, category=3, behaviour=4, time=5 (s)" in text
    assert "refused" not in text
    prepared = json.loads(report.read_text())
    assert prepared["rows"] == prepared["kept"] == generated["events"]
    assert not any(prepared["rejected"].values())
    for source in (log, out):
        assert "item seen" in run("stats", source, "--json", report)
        assert json.loads(report.read_text())["users"] == 60


def test_window(tmp_path: Path) -> None:
    log, report = tmp_path / "log.csv", tmp_path / "report.json"
    log.write_text("1,2,3,pv,1511539205\n1,2,3,pv,-5\n1,3,3,pv,1511539200\n")
    for options, kept in (([], 3), (["--window", "0", "1511539200"], 1)):
        text = run("prepare", log, tmp_path / "out", "--force", "--json", report, *options)
        assert json.loads(report.read_text())["kept"] == kept
        assert ("refused: window" in text) == bool(options)


def test_options_that_state_the_layout(tmp_path: Path) -> None:
    log, report = tmp_path / "log.txt", tmp_path / "report.json"
    log.write_text("t|who|what|kind\n1511539200000|007|a b|4\n1511539300000|7|c|1\n")
    options = ["--columns", "user=who,item=3,time=t,behaviour=kind", "--delimiter", "|", "--header"]
    options += ["--time-unit", "ms", "--ids", "text", "--behaviours", "4=buy,1=pv"]
    text = run("prepare", log, tmp_path / "out", "--json", report, *options)
    assert "user=who (text), item=what (text), behaviour=kind, time=t (ms)" in text
    values = json.loads(report.read_text())
    assert (values["users"], values["items"]) == (2, 2)
    assert values["behaviours"] == {"pv": 1, "cart": 0, "fav": 0, "buy": 1}
    assert "2 of 2 users have fewer than 3 events" in text
    assert json.loads(report.read_text())["read_as"] in text
    text = run("stats", log, "--columns", "user=who,item=what,behaviour=none", "--json", report)
    assert json.loads(report.read_text())["users"] == 2


def test_several_files_and_standard_input(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("".join(f"{name}{i % 2},{i}\n" for i in range(9)))
    report = tmp_path / "report.json"
    run("prepare", tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "out", "--json", report)
    assert json.loads(report.read_text())["users"] == 4
    script = "import sys; from fastrec.data.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", script, "prepare", "-", str(tmp_path / "piped")]
    data = (tmp_path / "a.csv").read_bytes()
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    assert b"read as: csv, no header, user=1 (text), item=2" in done.stderr
    assert SequenceDataset.open(tmp_path / "piped").n_users == 2


def test_refused_rows_are_shown_with_what_would_read_them(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("1,2,3,pv,1511539200\n" * 200 + "1,2,3\nx,2,3,pv,1511539200\n")
    text = run("prepare", log, tmp_path / "out")
    assert "log.csv:201: wrong number of fields (expected 5): '1,2,3'" in text
    assert "log.csv:202: user is not a 64-bit integer" in text
    assert "--ids text" in text


def test_errors_reach_the_caller_typed(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("1,2,3,pv,1511539200\n" * 9 + "1,2,3\n")
    with pytest.raises(DataError, match=r"log\.csv:10: wrong number of fields"):
        run("prepare", log, tmp_path / "out", "--strict")
    for columns, message in (
        ("user", "NAME=VALUE"),
        ("user=1,user=2", "NAME=VALUE"),
        ("who=1", "roles among"),
        ("user=0", "numbers from 1"),
        ("user=none", "a column for user"),
        ("user=9,item=1", "one of the columns 1='1', 2='2'"),
        ("user=id,item=1", "one of the columns"),
        ("user=1,item=1", "a column of its own"),
    ):
        with pytest.raises(ArgumentError, match=message):
            run("prepare", log, tmp_path / "out", "--columns", columns)


def test_the_room_imports_lightly() -> None:
    script = (
        "import sys, fastrec.data, fastrec.data.cli\n"
        "assert not {'polars', 'torch', 'numpy'} & set(sys.modules)\n"
        "import fastrec.data.dataset\n"
        "assert not {'polars', 'torch'} & set(sys.modules)\n"
        "from fastrec.data import prepare, generate\n"
        "assert callable(prepare) and callable(generate)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

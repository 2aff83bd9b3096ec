"""The ``fastrec`` command itself: its name, its version, and errors as one line."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import fastrec
from fastrec import cli
from fastrec.errors import MissingDependencyError
from fastrec.measure.packages import EXTRAS, extra_of
from fastrec.terminal import progress, stdout, write_json


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastrec", *arguments])
    monkeypatch.setattr(cli, "app", cli.typer.Typer(no_args_is_help=True))
    cli.app.callback()(cli._fastrec)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_the_version_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, "--version") == (0, f"fastrec {fastrec.__version__}\n", "")


def test_python_m_fastrec_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastrec", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fastrec {fastrec.__version__}\n"


def test_what_looks_like_markup_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, told = run(monkeypatch, capsys, "export", "model[/x]", "out.onnx")
    assert code == 2
    assert "model[/x]" in told
    stdout().print(str(MissingDependencyError("torch", "torch", "[bold]this[/]")))
    advice = "[bold]this[/] needs torch: pip install 'fastrec-kernels[torch]'"
    assert advice in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [n for n in sys.modules if n.startswith("fastrec.train.")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, told = run(monkeypatch, capsys, "train", str(tmp_path), str(tmp_path / "out"))
    assert code == 2
    assert "torch" in told
    assert told.count("\n") == 1
    assert "pip install 'fastrec-kernels[torch]'" in told


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "report.json")
    code, out, told = run(monkeypatch, capsys, "info", "--json", where)
    assert code == 2
    assert out == ""
    assert where in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_that_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, told = run(monkeypatch, capsys, "info", "--json", "/dev/full")
    assert (code, told) == (2, "OSError: /dev/full: No space left on device\n")


def test_a_full_disk_that_names_no_file_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: usage(1, 1, 0 if Path(at) == tmp_path else 1 << 30)
    )
    monkeypatch.setattr(sys, "argv", ["fastrec", "train", "--out", str(tmp_path / "not" / "yet")])
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cli._system_message(error) == f"No space left on device: {tmp_path}"


def test_reports_hold_null_for_numbers_that_json_has_not(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "r.json", {"a": [float("nan"), 1.5], "b": (float("inf"),)})
    text = (tmp_path / "new" / "r.json").read_text()
    assert text.split() == ["{", '"a":', "[", "null,", "1.5", "],", '"b":', "[", "null", "]", "}"]


def test_progress_elsewhere_than_on_a_terminal_is_a_line_a_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress() as tell:
        for step in range(4):
            tell("timing [a/b]", step, 4)
        tell("saving", 0, 0, "to disk")
    stages = [line.split("s  ")[1].strip() for line in stream.getvalue().splitlines()]
    assert stages == ["timing [a/b]", "saving, to disk"]


def test_progress_speaks_though_the_stage_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("fastrec.terminal._SILENCE_S", 0.05)
    with progress() as tell:
        tell("building", 1, 4)
        while stream.getvalue().count("building: 25%") < 3:
            os.sched_yield()


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_is_traced_to_it(extra: str) -> None:
    for package in EXTRAS[extra]:
        assert extra_of(package.replace("-", "_")) == extra
    assert extra_of("grpc") == "serve"
    assert extra_of("numpy") is None

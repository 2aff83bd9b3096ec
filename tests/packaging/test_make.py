"""``make`` installs what a target needs, and ``make test`` runs all of its parts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or "/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder that says that everything is installed."""
    folder = tmp_path / "venv"
    folder.mkdir()
    for name in (".made", ".demo", ".test"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("ignore", 2), ("tests/serving$", 2)])
def test_both_parts_of_the_tests_run_and_either_fails_the_target(
    venv: Path, tmp_path: Path, failing: str, code: int
) -> None:
    log, fake = tmp_path / "log", tmp_path / "pytest"
    fake.write_text(f'#!/bin/sh\necho "$*" >> {log}\necho "$*" | grep -qv -- "{failing}"\n')
    fake.chmod(0o755)
    done = make("test", f"VENV={venv}", f"PYTEST={fake}")
    assert done.returncode == code, done.stderr
    first, second = log.read_text().splitlines()
    assert "--ignore=tests/serving" in first
    assert second.endswith("tests/serving")


def test_the_demo_installs_neither_the_tests_packages_nor_cuda(tmp_path: Path) -> None:
    told = make("-n", "demo", f"VENV={tmp_path / 'new'}").stdout
    assert "'.[demo]'" in told
    assert "'.[test]'" not in told
    assert told.count("FASTREC_BUILD_CUDA=0") == 2


def test_uv_is_used_where_it_is_there(tmp_path: Path) -> None:
    told = make("-n", "test", f"VENV={tmp_path / 'new'}").stdout
    assert " -m venv " in told
    assert "-m pip install" in told
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    told = make("-n", "test", f"VENV={tmp_path / 'new'}", path=f"{tmp_path}:/usr/bin:/bin").stdout
    assert f"{tmp_path}/uv venv --seed" in told
    assert f"{tmp_path}/uv pip install --python" in told
    assert "-m pip install" not in told

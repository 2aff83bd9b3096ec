"""The distribution is ``fastrec-kernels``: nothing may send a user to the other project on PyPI."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastrec.errors import DISTRIBUTION, install_command
from fastrec.measure.packages import EXTRAS

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
# The bare name behind an installer's command, or the bare name with an extra.
ANOTHER_PROJECT = re.compile(
    r"\b(pip3?|pipx|uv|poetry|conda)\s+(pip\s+)?(install|add|download)\b"
    r"[^\n]*[ \t'\"]fastrec(?![\w./-])"
    r"|(?<![\w.-])fastrec\[[a-z]"
)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_no_file_tells_anyone_to_install_the_other_project() -> None:
    told = []
    for path in tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        for found in ANOTHER_PROJECT.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            told.append(f"{path.relative_to(ROOT)}:{line}: {found[0]}")
    assert not told


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("pip install fastrec", True),
        ("uv pip install -U 'fastrec'", True),
        ("needs fastrec[torch]", True),
        ("pip install 'fastrec-kernels[torch]'", False),
        ("pip install . # fastrec.nn is there then", False),
        ("import fastrec", False),
    ],
)
def test_the_rule_itself(text: str, refused: bool) -> None:
    assert bool(ANOTHER_PROJECT.search(text)) is refused


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    if tomllib is None:
        pytest.skip("TOML needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_messages_and_metadata_name_one_distribution(project: dict[str, Any]) -> None:
    assert project["name"] == DISTRIBUTION
    assert install_command("torch", "data") == "pip install 'fastrec-kernels[torch,data]'"
    assert project["urls"]


def test_the_table_of_extras_is_the_metadata_s(project: dict[str, Any]) -> None:
    optional = project["optional-dependencies"]
    assert set(EXTRAS) == set(optional) - {"all", "demo", "test", "lint", "docs", "dev"}
    for extra, packages in EXTRAS.items():
        names = {re.split(r"[\[><=;]", need)[0].strip() for need in optional[extra]}
        assert set(packages) <= names, extra

"""Logs for the tests: small ones written here, and real ones where this machine has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrec.data import SequenceDataset, generate, prepare

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_file() -> Callable[[str], Path]:
    """A real log by name, from FASTREC_DATA or a ``shared/data`` folder beside the repository."""
    folder = Path(os.environ.get("FASTREC_DATA") or REPOSITORY.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}: set FASTREC_DATA to the folder that holds it")
        return folder / name

    return find


@pytest.fixture(scope="session")
def demo_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic log of 300 users."""
    path = tmp_path_factory.mktemp("log") / "demo.csv"
    generate(path, preset="demo", n_users=300, seed=1)
    return path


@pytest.fixture(scope="session")
def demo(demo_log: Path) -> SequenceDataset:
    """The data set made of it; 20 events of history."""
    out = demo_log.parent / "prepared"
    prepare(demo_log, out, max_history=20)
    return SequenceDataset.open(out, verify=True)

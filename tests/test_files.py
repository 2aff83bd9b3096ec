"""Files and folders are replaced in one step: crashes, full disks, readers, umask, leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import files
from fastrec.errors import StorageError
from fastrec.files import atomic_folder, atomic_write, recover


@pytest.mark.parametrize("verb", ["file", "save", "prepare", "engine", "checkpoint"])
def test_a_writer_killed_or_out_of_space_at_any_step_leaves_old_or_new(
    verb: str, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("crash.py")
    command = [sys.executable, str(script), verb, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # interruptions survived


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_what_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        with atomic_write(tmp_path / "deep" / "file") as draft:
            draft.write_text("x")
        with atomic_folder(tmp_path / "folder") as draft:
            (draft / "a").write_text("x")
    assert (tmp_path / "deep" / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    for make in (atomic_write, atomic_folder):
        with pytest.raises(ZeroDivisionError), make(tmp_path / "target"):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_errors_of_the_system_name_the_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(StorageError, match=r"file/below: cannot be written \(Not a directory\)"),
        atomic_write(tmp_path / "file" / "below"),
    ):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("mine")
    with (
        pytest.raises(StorageError, match=r"full: cannot be written"),
        atomic_write(tmp_path / "full"),
    ):
        pass
    assert (tmp_path / "full" / "thesis").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_drafts_of_running_writers_stay_and_those_of_others_too(tmp_path: Path) -> None:
    (tmp_path / ".a.partial-notours").write_text("mine")
    with atomic_write(tmp_path / "a") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "a") as second:
            second.write_text("second")
        assert first.read_text() == "first"
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial-notours", "a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_readers_always_find_a_whole_folder(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that opens the folder once sees files of one version."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target, stop, seen = tmp_path / "target", threading.Event(), []

    def write(version: int) -> None:
        with atomic_folder(target, sync=False) as draft:
            for name in "ab":
                (draft / name).write_text(str(version))

    def read() -> None:
        while not stop.is_set():
            recover(target)
            try:
                handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                seen.append({"no folder"})
                continue
            try:
                seen.append({_content(name, handle) for name in "ab"})
            except FileNotFoundError:
                pass  # it was replaced, and removed, since it was opened
            finally:
                os.close(handle)

    write(0)
    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1, 200):
        write(version)
    stop.set()
    reader.join()
    assert all(len(versions) == 1 for versions in seen)
    if exchange:
        assert {"no folder"} not in seen
    assert (target / "a").read_text() == "199"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def _content(name: str, folder: int) -> str:
    handle = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(handle, 100).decode()
    finally:
        os.close(handle)


@settings(max_examples=30, deadline=None)
@given(
    name=st.text(
        st.characters(blacklist_characters="/\0", codec="utf-8"), min_size=1, max_size=20
    ).filter(lambda name: name not in (".", "..")),
    versions=st.lists(st.binary(max_size=100), min_size=1, max_size=4),
    folder=st.booleans(),
)
def test_any_name_holds_the_last_content(
    tmp_path_factory: pytest.TempPathFactory, name: str, versions: list[bytes], folder: bool
) -> None:
    parent = tmp_path_factory.mktemp("any")
    for content in versions:
        if folder:
            with atomic_folder(parent / name, sync=False) as draft:
                (draft / "x").write_bytes(content)
        else:
            with atomic_write(parent / name, sync=False) as draft:
                draft.write_bytes(content)
    file = parent / name / "x" if folder else parent / name
    assert file.read_bytes() == versions[-1]
    assert os.listdir(parent) == [name]

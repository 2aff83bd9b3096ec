from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastrec.data import SequenceDataset, prepare
from fastrec.data.storage import ArrayWriter, FolderWriter, crc32_of
from fastrec.errors import ArgumentError, ArtifactError, DataError


@pytest.fixture
def folder(demo: SequenceDataset, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(demo.path, tmp_path / "data"))


@pytest.mark.parametrize("length", [0, 1, 1000, 10**6])
def test_appended_arrays_are_plain_npy(tmp_path: Path, length: int) -> None:
    writer = ArrayWriter(tmp_path / "x.npy", np.int32)
    for part in np.array_split(np.arange(length), 3):
        writer.append(part)
    entry = writer.close()
    assert (np.load(tmp_path / "x.npy") == np.arange(length, dtype=np.int32)).all()
    assert entry["bytes"] == (tmp_path / "x.npy").stat().st_size
    assert entry["crc32"] == crc32_of(tmp_path / "x.npy")


def test_any_flipped_byte_is_found(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        original = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=file.name):
            SequenceDataset.open(folder)
        file.write_bytes(original)
    SequenceDataset.open(folder, verify=True)


@pytest.mark.parametrize("verify", [True, False])
def test_cut_and_missing_files_are_named(folder: Path, verify: bool) -> None:
    file = folder / "times.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"times\.npy: has {len(data) - 1} bytes, expected"):
        SequenceDataset.open(folder, verify=verify)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"times\.npy: is missing"):
        SequenceDataset.open(folder, verify=verify)


def test_a_header_broken_at_the_same_size_is_named(folder: Path) -> None:
    file = folder / "items.npy"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ArtifactError, match=r"items\.npy: not a \.npy file"):
        SequenceDataset.open(folder, verify=False)


def test_arrays_must_fit_each_other(folder: Path) -> None:
    values = np.load(folder / "offsets.npy").copy()
    values[-1] += 1
    np.save(folder / "offsets.npy", values)
    with pytest.raises(ArtifactError, match=r"offsets\.npy: does not fit"):
        SequenceDataset.open(folder, verify=False)


def test_manifest_damage(folder: Path) -> None:
    file = folder / "manifest.json"
    text = file.read_text()
    manifest = json.loads(text)
    for damaged, message in (
        (text[: len(text) // 2], "not valid JSON"),
        (json.dumps({**manifest, "n_users": 1}), "was altered"),
        (json.dumps({**manifest, "version": 99}), "version 99"),
        (json.dumps({**manifest, "format": "other"}), "is not a fastrec-sequences manifest"),
        ("[]", "is not a fastrec-sequences manifest"),
    ):
        file.write_text(damaged)
        with pytest.raises(ArtifactError, match=message):
            SequenceDataset.open(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        SequenceDataset.open(folder)
    with pytest.raises(DataError, match="no such folder"):
        SequenceDataset.open(folder / "none")


def test_an_existing_target_is_replaced_only_if_asked_and_only_if_ours(
    demo_log: Path, folder: Path
) -> None:
    with pytest.raises(ArgumentError, match="out: expected a new path"):
        prepare(demo_log, folder)
    prepare(demo_log, folder, max_history=5, force=True)
    assert SequenceDataset.open(folder).history_length == 5
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    precious = folder.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(ArgumentError, match="something else"):
        prepare(demo_log, precious, force=True)
    with pytest.raises(ArgumentError, match="something else"):
        prepare(demo_log, precious / "thesis.txt", force=True)
    assert (precious / "thesis.txt").read_text() == "x"


def test_the_old_folder_survives_a_failed_rename(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError("disk on fire")

    with FolderWriter(folder, force=True) as writer:
        writer.write("items", np.arange(3))
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="on fire"):
            writer.commit({})
    assert SequenceDataset.open(folder, verify=True).n_users == 300


def test_a_running_writer_is_left_alone(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "out") as first, FolderWriter(tmp_path / "out") as second:
        assert first.path != second.path
        assert first.path.is_dir()
        first.write("x", np.arange(3))
        first.commit({})
        second.write("x", np.arange(4))
        with pytest.raises(ArgumentError, match="out"):
            second.commit({})
    assert len(np.load(tmp_path / "out" / "x.npy")) == 3

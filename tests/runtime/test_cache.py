"""What is read from the cache is what was written there, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrec.runtime.cache import digest, read_checked, write_checked


@given(content=st.binary(max_size=200))
def test_content_comes_back(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("cache") / "a" / "b.bin"
    assert write_checked(file, content)
    assert read_checked(file) == content
    assert [f.name for f in file.parent.iterdir()] == ["b.bin"]


@pytest.mark.parametrize("cut", [0, 1, 16, 30, 48, 50])
def test_a_file_cut_short_counts_as_missing(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "file"
    assert write_checked(file, b"content")
    file.write_bytes(file.read_bytes()[:cut])
    assert read_checked(file) is None


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert write_checked(file, b"content")
    whole = file.read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1
        file.write_bytes(altered)
        assert read_checked(file) is None


def test_what_is_no_file(tmp_path: Path) -> None:
    assert read_checked(tmp_path / "missing") is None
    assert read_checked(tmp_path) is None
    (tmp_path / "file").touch()
    assert not write_checked(tmp_path / "file" / "below", b"content")
    assert not write_checked(tmp_path, b"content")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file"]


def test_equal_values_have_one_name() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})

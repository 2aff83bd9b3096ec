"""A native engine's file: the same bits without torch; what is wrong with it is a typed error."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrec
from fastrec.errors import ArgumentError, ArtifactError, BackendError, FastrecError
from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import native, reason_missing
from fastrec.measure.memory import run_child
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime import load_engine
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.runtime.native import backend
from fastrec.runtime.native.file import MAGIC

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=33, d=32, category_dim=8, ffn=48, tower=(40, 24)
)


def request(batch: int, length: int, candidates: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    sizes = {"B": batch, "L": length, "m": candidates}
    return spec_of(Ranker(CONFIG), ()).sample(sizes, seed=seed)


def build(int8: bool) -> Engine:
    torch.manual_seed(1)
    model = Ranker(CONFIG).eval()
    inputs = tuple(map(torch.from_numpy, request(4, 33, 11)))
    if int8:
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    options = BuildOptions(2, None, [], spec_of(model, inputs), {"executor": "plan"})
    return backend.build(model, inputs, options)


@pytest.fixture(scope="module", params=["float", "int8"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    engine = build(request.param == "int8")
    return engine, engine.save(tmp_path_factory.mktemp("engine") / "ranker.fastrec")


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and sections."""
    size = struct.unpack_from("<Q", content, 16)[0]
    return json.loads(content[64 : 64 + size]), content[64 + size :]


def joined(header: dict[str, Any], sections: bytes) -> bytes:
    """A file whose checksums are right, whatever it says."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    prefix = struct.pack(
        "<8sIIQQ", MAGIC, native().engine.FILE_VERSION, 0, len(text), 64 + len(text) + len(sections)
    )
    return prefix + hashlib.sha256(prefix + text).digest() + text + sections


def test_the_same_bits(saved: tuple[Engine, Path]) -> None:
    engine, path = saved
    with load_engine(path) as loaded:
        assert loaded.spec == engine.spec
        assert (loaded.precision, loaded.threads) == (engine.precision, 2)
        assert loaded.describe() == engine.describe()
        for sizes in ((1, 33, 11), (3, 1, 1), (2, 17, 70)):
            inputs = request(*sizes, seed=sizes[0])
            np.testing.assert_array_equal(loaded(*inputs), engine(*inputs))
            state = loaded.encode(*inputs[:4])
            np.testing.assert_array_equal(loaded.score(state, *inputs[4:]), engine(*inputs))
        again = loaded.save(path.with_name("again"))
    with load_engine(again, threads=1) as third:
        np.testing.assert_array_equal(third(*inputs), engine(*inputs))
        assert third.threads == 1


def test_it_serves_without_torch_or_growth(saved: tuple[Engine, Path]) -> None:
    # bench/bench_engine_serving.py is the long run.
    command = [sys.executable, "-m", "fastrec.runtime.child", "--artifact", str(saved[1])]
    report = run_child([*command, "--requests", "2000", "--candidates", "5"])
    assert report["torch_imported"] is False
    assert report["backend"] == "native"
    assert report["serving_rss_mb"] < report["loaded_rss_mb"] + 5
    # Python and numpy are some 30 MB, torch would be 200 more.
    assert report["serving_rss_mb"] < 100


def test_truncated_files_are_refused(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    content = saved[1].read_bytes()
    path = tmp_path / "cut"
    for size in {*range(130), *range(130, len(content), 997), len(content) - 1}:
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactError, match="truncated"):
            load_engine(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ArtifactError, match="altered"):
        load_engine(path)


def test_altered_files_are_refused(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    content = bytearray(saved[1].read_bytes())
    path = tmp_path / "altered"
    draw = random.Random(0)
    for place in [*range(64), *(draw.randrange(64, len(content)) for _ in range(150))]:
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            load_engine(path)
        content[place] ^= 1 << place % 8


def test_foreign_newer_and_missing_files(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    content = bytearray(saved[1].read_bytes())
    path = tmp_path / "file"
    with pytest.raises(ArtifactError, match="No such file"):
        load_engine(path)
    path.write_bytes(b"PK\x03\x04" + bytes(content[4:]))
    with pytest.raises(ArtifactError, match="is not an engine artifact"):
        load_engine(path)
    for version, remedy in (
        (native().engine.FILE_VERSION - 1, "compile the model again"),
        (native().engine.FILE_VERSION + 1, "newer"),
    ):
        struct.pack_into("<I", content, 8, version)
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"version {version}, this reads .*{remedy}"):
            load_engine(path)
    header, sections = split(saved[1].read_bytes())
    path.write_bytes(joined({**header, "requires": "avx2048"}, sections))
    with pytest.raises(BackendError, match="needs the instruction set avx2048"):
        load_engine(path)
    for threads in (0, True, "2"):
        with pytest.raises(ArgumentError, match="threads"):
            load_engine(saved[1], threads=threads)  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_old_file(
    saved: tuple[Engine, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved[0].save(tmp_path / "engine")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved[0].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    other = tmp_path / "notes.txt"
    other.write_text("keep")
    with pytest.raises(ArtifactError, match="left as it is"):
        saved[0].save(other)
    assert other.read_text() == "keep"


# Hostile files: their checksums are right.


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers and texts of a JSON value."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in leaves(v, (*path, k))]
    if isinstance(value, list):
        return [path, *(p for i, v in enumerate(value) for p in leaves(v, (*path, i)))]
    return [path]


def tried(path: Path) -> None:
    """A file is refused with a typed error, or it serves any request without a crash."""
    try:
        engine = load_engine(path)
        for sizes in ((1, 33, 11), (2, 3, 1)):
            engine(*request(*sizes))
    except (FastrecError, MemoryError):
        pass


VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 2, 31, 33, 2**31, 2**40, 2**62, 2**80, 1.5, None, "B", [], {}]),
    st.integers(0, 300),
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_hostile_header(
    saved: tuple[Engine, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header, sections = split(saved[1].read_bytes())
    places = [("program", *p) for p in leaves(header["program"])]
    places += [("spec", *p) for p in leaves(header["spec"])]
    places += [("sections", *p) for p in leaves(header["sections"])]
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places))
        value: Any = header
        try:
            for key in way:
                value = value[key]
            value[last] = data.draw(VALUES)
        except (TypeError, IndexError, KeyError):  # changed away
            continue
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(joined(header, sections))
    tried(path)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_hostile_constants(
    saved: tuple[Engine, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header, body = split(saved[1].read_bytes())
    sections = bytearray(body)
    row = data.draw(st.sampled_from(header["sections"]))
    begin, size = row["begin"], row["bytes"]
    for _ in range(data.draw(st.integers(1, 4))):
        sections[begin + data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    end = begin + size + -size % 64
    row["sha256"] = hashlib.sha256(sections[begin:end]).hexdigest()
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(joined(header, bytes(sections)))
    tried(path)


def test_a_plan_that_reaches_outside_is_refused(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    original, sections = split(saved[1].read_bytes())
    path = tmp_path / "outside"
    for step, row in enumerate(original["program"]["steps"]):
        for name, operand in row["operands"].items():
            views = range(len(operand)) if name == "x" and row["kind"] == "map" else [None]
            for index in views:
                header = json.loads(json.dumps(original))
                changed = header["program"]["steps"][step]["operands"][name]
                view = changed if index is None else changed[index]
                view[1] += 2**30  # the offset
                path.write_bytes(joined(header, sections))
                with pytest.raises(ArtifactError, match="inside their buffers"):
                    load_engine(path)

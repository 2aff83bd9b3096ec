"""Compiled checkpoints in the cache: of the checkpoint that is there, whole, or compiled again."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from serving_process import Running, ranker

import fastrec
from fastrec.errors import ArtifactError
from fastrec.runtime import load_engine
from fastrec.serving import compile as child
from fastrec.serving import repository


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests that were compiled; by this process, which is quicker."""
    compiled: list[str] = []

    async def compile_here(checkpoint: Path, engine: Path, digest: str) -> bool:
        compiled.append(digest)
        return child.main([str(checkpoint), str(engine), digest]) == 0

    monkeypatch.setattr(repository, "_compile", compile_here)
    return compiled


def scores_of(engine: Path) -> np.ndarray:
    with load_engine(engine) as opened:
        return opened(*opened.spec.sample({"B": 2, "m": 5}))


def expected_of(model: torch.nn.Module, engine: Path) -> np.ndarray:
    with load_engine(engine) as opened, torch.inference_mode():
        request = opened.spec.sample({"B": 2, "m": 5})
        return model(*map(torch.from_numpy, request)).numpy()


def test_an_engine_is_of_the_checkpoint_that_it_is_kept_for(
    tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ranker(1), ranker(2)
    checkpoint, cache = tmp_path / "model", tmp_path / "cache"
    fastrec.save(old, checkpoint)
    load = fastrec.compress.load

    def replaced_before(path: str) -> torch.nn.Module:
        if len(in_process) == 1:
            fastrec.save(new, checkpoint)
        return load(path)

    monkeypatch.setattr(fastrec.compress, "load", replaced_before)
    engine = asyncio.run(repository.compiled(checkpoint, cache))
    assert list(cache.iterdir()) == [engine]
    np.testing.assert_allclose(scores_of(engine), expected_of(new, engine), rtol=1e-3, atol=1e-5)
    fastrec.save(old, checkpoint)  # a rollback
    engine = asyncio.run(repository.compiled(checkpoint, cache))
    np.testing.assert_allclose(scores_of(engine), expected_of(old, engine), rtol=1e-3, atol=1e-5)
    assert len(in_process) == 3


def test_a_damaged_engine_is_compiled_again(tmp_path: Path, in_process: list[str]) -> None:
    fastrec.save(ranker(1), tmp_path / "model")
    cache = tmp_path / "cache"
    engine = asyncio.run(repository.compiled(tmp_path / "model", cache))
    whole = engine.read_bytes()
    for broken in (whole[:-1], whole[:200] + b"\0" + whole[201:], b"another file", whole[:8]):
        engine.unlink()
        engine.write_bytes(broken)
        assert asyncio.run(repository.compiled(tmp_path / "model", cache)) == engine
        load_engine(engine).close()
    assert len(in_process) == 5
    asyncio.run(repository.compiled(tmp_path / "model", cache))
    assert len(in_process) == 5


def test_a_checkpoint_that_never_stays_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastrec.save(ranker(1), tmp_path / "model")

    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(repository, "_compile", never)
    with pytest.raises(ArtifactError, match="replaced again and again"):
        asyncio.run(repository.compiled(tmp_path / "model", tmp_path / "cache"))


def test_another_checkpoint_is_not_compiled(tmp_path: Path) -> None:
    fastrec.save(ranker(1), tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "engine"), "0" * 64]
    assert child.main(arguments) == child.REPLACED
    assert not (tmp_path / "engine").exists()


def test_a_cache_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    fastrec.save(ranker(1), tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "file"))
    server = Running(tmp_path / "model")
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    server.close()
    assert not list((tmp_path / "temporary").iterdir())

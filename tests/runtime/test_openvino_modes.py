"""OpenVINO's throughput mode, its model cache, and calls from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastrec
from fastrec.errors import ArgumentError
from fastrec.measure import machine
from fastrec.runtime import load_engine

pytest.importorskip("openvino", reason="OpenVINO comes with fastrec-kernels[openvino]")

STATIC = {"shapes": "static", "hint": "f32"}


def compiled(model: Any, request: Any, **settings: Any) -> Any:
    return fastrec.compile(model, request, "openvino", 2, settings={**STATIC, **settings})


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_calls_from_several_threads(ranker, request_of, expected, tmp_path, mode):
    requests = [request_of(2, seed) for seed in range(8)]
    with compiled(ranker, request_of(2), mode=mode) as engine:
        engine.save(tmp_path / "engine")
        rows = engine.describe()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda request: engine(*request), requests * 8))
    for request, scores in zip(requests * 8, answers, strict=True):
        np.testing.assert_allclose(scores, expected(request), rtol=1e-4, atol=1e-4)
    assert any(f"{mode.upper()} hint" in row["setting"] for row in rows)
    with load_engine(tmp_path / "engine") as engine:
        assert engine._mode == mode
        np.testing.assert_allclose(engine(*requests[0]), answers[0], rtol=1e-6)


def blobs(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_size for f in folder.rglob("*") if f.is_file()}


def test_the_model_cache(ranker, request_of, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path))
    request = request_of(2, 3)

    def answers() -> None:
        with compiled(ranker, request_of(2), cache="on") as engine:
            np.testing.assert_allclose(engine(*request), expected(request), rtol=1e-4, atol=1e-4)
            assert any(row["setting"] == "model cache" for row in engine.describe())

    answers()
    first = blobs(tmp_path)
    assert first
    answers()  # from the cache
    assert blobs(tmp_path) == first
    for file in first:  # cut short: compiled again
        file.write_bytes(file.read_bytes()[:100])
    answers()
    # One of another machine is not read, whatever it holds.
    own = machine.cpu_identity()
    monkeypatch.setattr(machine, "cpu_identity", lambda: [*own, "another"])
    answers()
    assert len({f.parent for f in blobs(tmp_path)}) == 2


def test_no_cache_unless_asked(ranker, request_of, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path))
    compiled(ranker, request_of(1)).close()
    assert not blobs(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"mode": "fast"}, {"cache": True}, {"rounding": "up"}], ids=str
)
def test_bad_settings(ranker, request_of, settings):
    with pytest.raises(ArgumentError, match="settings"):
        compiled(ranker, request_of(1), **settings)


def test_rounding_as_openvino_does(ranker, request_of):
    import copy

    import torch

    from fastrec.exporters.model_spec import spec_of
    from fastrec.measure.timing import Tolerance, correctness_gate

    model, spec = copy.deepcopy(ranker), spec_of(ranker, ())
    drawn = tuple(map(torch.from_numpy, spec.sample({"B": 4, "m": 16})))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[drawn])
    request = request_of(2, 3)
    with torch.inference_mode():
        wanted = model(*map(torch.from_numpy, request)).numpy()
    operations = {}
    for rounding in ("exact", "fast"):
        with compiled(model, request_of(2), rounding=rounding) as engine:
            correctness_gate(wanted, engine(*request), Tolerance(noise=0.1)).require(rounding)
            kinds = [op.get_type_name() for op in engine._model.get_ordered_ops()]
            operations[rounding] = kinds.count("Round")
    assert operations["fast"] == 0 < operations["exact"]

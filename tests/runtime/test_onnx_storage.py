"""Exports that are two files, or sparse, or carry notes: the same answers."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch

import fastrec
from fastrec import export
from fastrec.errors import ArgumentError, ArtifactError
from fastrec.exporters.onnx import storage
from fastrec.exporters.onnx.export import verify_onnx
from fastrec.runtime.backends.onnxruntime import open_session
from fastrec.spec import InputSpec


def test_a_model_over_the_limit_is_two_files(ranker, request_of, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LARGEST_BYTES", 10_000)  # in place of 2 GB
    path = tmp_path / "model.onnx"
    for _ in range(2):  # over an older one: its data are not appended to
        assert export(ranker, path, request_of(2)) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = sum(t.numel() * 4 for t in ranker.parameters())
    data = tmp_path / "model.onnx.data"
    assert 0.9 * weights < data.stat().st_size < 1.5 * weights
    with fastrec.compile(ranker, request_of(2), "onnxruntime", 1) as engine:
        saved = engine.save(tmp_path / "engine")
    with fastrec.runtime.load_engine(saved) as engine:
        np.testing.assert_allclose(engine(*request_of(2)), expected(request_of(2)), atol=1e-4)
    data.unlink()
    with pytest.raises(ArtifactError, match="not a valid ONNX model"):
        verify_onnx(path, ranker, request_of(2))


def test_pruned_weights_as_sparse_initialisers(ranker, request_of, tmp_path):
    model = copy.deepcopy(ranker)
    with torch.no_grad():
        # Four in five of a weight's values gone: smaller sparse; half of another's: not.
        model.tower[0].weight[:, : 4 * model.tower[0].in_features // 5] = 0
        model.tower[2].weight[:, ::2] = 0
    dense = export(model, tmp_path / "dense.onnx", request_of(2))
    sparse = export(model, tmp_path / "sparse.onnx", request_of(2), sparse=True)
    assert sparse.stat().st_size < dense.stat().st_size
    stored = [list(t.dims) for t in onnx.load(sparse).graph.sparse_initializer]
    assert list(model.tower[0].weight.T.shape) in stored
    assert list(model.tower[2].weight.T.shape) not in stored
    session = open_session(sparse, threads=1)
    names = [i.name for i in session.get_inputs()]
    request = request_of(3, 4)
    with torch.inference_mode():
        wanted = model(*map(torch.from_numpy, request)).numpy()
    got = session.run(None, dict(zip(names, request, strict=True)))[0]
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_what_a_file_says_about_itself(ranker, request_of, tmp_path):
    path = tmp_path / "model.onnx"
    recipe = json.dumps({"prune": 0.4})
    export(ranker, path, request_of(2), metadata={"recipe": recipe})
    said = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert said["recipe"] == recipe
    spec = InputSpec.from_dict(json.loads(said["spec"]))
    assert spec.fields[0].rows == ranker.config.n_items
    for bad in ({"recipe": {"prune": 0.4}}, {"inputs": "mine"}, {3: "x"}):
        with pytest.raises(ArgumentError, match="metadata: expected text"):
            export(ranker, path, request_of(2), metadata=bad)  # type: ignore[arg-type]
    assert {p.key: p.value for p in onnx.load(path).metadata_props} == said
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

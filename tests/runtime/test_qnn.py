"""The HTP, simulated on x86: a context binary that answers as torch does in float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastrec
from fastrec.errors import ArgumentError, BackendError, MissingDependencyError, ShapeError
from fastrec.exporters.model_spec import spec_of
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.models import Ranker
from fastrec.runtime.backends import qnn

pytestmark = pytest.mark.skipif(qnn.can_run() is not None, reason=str(qnn.can_run()))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_context_binary_answers_as_torch(ranker, request_of, tmp_path, precision):
    model = ranker
    if precision == "int8":
        model = Ranker(ranker.config).eval()
        model.load_state_dict(ranker.state_dict())
        batch = tuple(map(torch.from_numpy, request_of(16)))
        fastrec.quantize_(model, fastrec.Int8(), [batch])
    with fastrec.compile(model, request_of(2), "qnn", 1) as engine:
        assert engine.precision == precision
        rows = [row["why"] for row in engine.describe()]
        assert any("operators on the HTP" in why for why in rows)
        if qnn.simulated():
            assert any("its times say nothing" in why for why in rows)
        with pytest.raises(ShapeError, match="item: expected shape"):
            engine(*request_of(3))
        path = engine.save(tmp_path / "engine")
    with fastrec.runtime.load_engine(path) as loaded:
        request = request_of(2, 5)
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, request)).numpy()
        scores = loaded(*request)
        # float16 between layers: 2^-11 of each value; some dozen layers of a spread of 0.4.
        correctness_gate(expected, scores, Tolerance(noise=0.1)).require("qnn")
        assert np.abs(scores - expected).max() > 0
    assert spec_of(model, ()).names == loaded.spec.names


def test_bad_settings(ranker, request_of, monkeypatch):
    with pytest.raises(ArgumentError, match="settings"):
        fastrec.compile(ranker, request_of(1), "qnn", settings={"chip": "57"})
    with pytest.raises(ArgumentError, match="a number of Qualcomm's"):
        fastrec.compile(ranker, request_of(1), "qnn", settings={"soc_model": "snapdragon"})
    with pytest.raises(BackendError, match="runs this model in fp16"):
        fastrec.compile(ranker, request_of(1), "qnn", precision="int8")
    monkeypatch.setattr(qnn, "missing", lambda module: True)
    with pytest.raises(MissingDependencyError, match=r"fastrec-kernels\[qnn\]"):
        fastrec.compile(ranker, request_of(1), "qnn")


def test_auto_leaves_it_to_those_who_ask(ranker, request_of, monkeypatch):
    for name in ("openvino", "onnxruntime", "litert", "torch_compile", "torch_eager"):
        monkeypatch.setattr(f"fastrec.runtime.backends.{name}.can_run", lambda: "not in this test")
    with fastrec.compile(ranker, request_of(1), threads=1) as engine:
        rows = {row["setting"]: row for row in engine.describe() if row["op"] == "choice"}
    assert rows["qnn"]["why"].endswith("ask for it by name")

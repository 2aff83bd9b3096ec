"""Saved engines and exports: whole or refused, served without torch."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

import fastrec
from fastrec import export
from fastrec.errors import ArtifactError, BackendError
from fastrec.exporters.onnx.export import verify_onnx
from fastrec.measure.machine import machine_card
from fastrec.measure.memory import memory_mb, peak_rss_mb, run_child
from fastrec.nn import SparseInt8Linear
from fastrec.runtime import artifact, cli, load_engine
from fastrec.runtime import compile as compile_engine


@pytest.fixture(scope="module")
def exported(ranker, tmp_path_factory):
    from fastrec.exporters.model_spec import spec_of

    examples = spec_of(ranker, ()).sample({"m": 16})
    return export(ranker, tmp_path_factory.mktemp("onnx") / "model.onnx", examples)


def test_an_export_is_standard_onnx_with_a_free_batch(exported):
    proto = onnx.load(exported)
    assert {node.domain for node in proto.graph.node} == {""}
    assert next(o.version for o in proto.opset_import if o.domain == "") >= 17
    names = [i.name for i in proto.graph.input]
    assert names == ["item", "category", "behaviour", "length", "cand_item", "cand_category"]
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param
    assert "item int64" in {p.key: p.value for p in proto.metadata_props}["inputs"]


def test_an_altered_export_is_found(exported, ranker, request_of, tmp_path):
    verify_onnx(exported, ranker, request_of(1))
    proto = onnx.load(exported)
    largest = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    largest.raw_data = np.flip(np.frombuffer(largest.raw_data, np.float32)).tobytes()
    onnx.save(proto, tmp_path / "altered.onnx")
    with pytest.raises(BackendError, match="the ONNX export disagrees with torch"):
        verify_onnx(tmp_path / "altered.onnx", ranker, request_of(1))
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="not a valid ONNX model"):
        verify_onnx(tmp_path / "cut.onnx", ranker, request_of(1))


def test_custom_operators_are_refused(exported, ranker, request_of, tmp_path):
    proto = onnx.load(exported)
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    proto.graph.node[0].domain = "com.example"
    onnx.save(proto, tmp_path / "custom.onnx")
    with pytest.raises(BackendError, match=r"not standard ONNX operators: com\.example::"):
        verify_onnx(tmp_path / "custom.onnx", ranker, request_of(1))


def test_a_failed_export_leaves_nothing(tmp_path):
    layer = SparseInt8Linear.from_float(
        nn.Linear(8, 4), calibration=[torch.ones(1, 8)], out="bfloat16"
    )
    model = nn.Sequential(nn.Linear(8, 8), layer).eval()
    with pytest.raises(BackendError, match="bfloat16 output has no ONNX form"):
        export(model, tmp_path / "model.onnx", (torch.zeros(1, 8),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "litert"])
def test_a_saved_engine_serves_without_torch(ranker, request_of, expected, tmp_path, backend):
    with compile_engine(ranker, request_of(1), backend, 2) as engine:
        path = engine.save(tmp_path / "engine")
        engine.save(path)  # over an older one
    request = request_of(3, 1)
    with load_engine(path, threads=1) as loaded:
        assert (loaded.backend, loaded.precision, loaded.threads) == (backend, "fp32", 1)
        np.testing.assert_allclose(loaded(*request), expected(request), rtol=1e-4, atol=1e-4)
    command = [sys.executable, "-m", "fastrec.runtime.child", "--artifact", str(path)]
    report = run_child([*command, "--requests", "5"])
    assert report["torch_imported"] is False
    assert report["backend"] == backend
    assert 10 < report["loaded_rss_mb"] <= report["peak_rss_mb"] < 2000
    assert report["serving_rss_mb"] <= report["peak_rss_mb"]
    largest = max(
        (f for f in path.iterdir() if f.name != "engine.json"), key=lambda f: f.stat().st_size
    )
    content = largest.read_bytes()
    for broken in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
        largest.write_bytes(broken)
        with pytest.raises(ArtifactError, match="truncated or was altered"):
            load_engine(path)
    with pytest.raises(BackendError, match="truncated or was altered"):
        peak_rss_mb(command)
    largest.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_engine(path)


def test_what_is_no_artifact(tmp_path, ranker, request_of):
    with pytest.raises(ArtifactError, match="not an engine artifact"):
        load_engine(tmp_path)
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not an engine artifact's header"):
        load_engine(tmp_path)
    header = {"format": "fastrec-engine", "version": 99, "files": {}}
    (tmp_path / "engine.json").write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match="has version 99"):
        load_engine(tmp_path)
    (tmp_path / "engine.json").write_text(json.dumps({**header, "version": 1, "backend": "native"}))
    with pytest.raises(BackendError, match="a native engine is one file"):
        load_engine(tmp_path)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="left as it is"):
        artifact.write(other, {"backend": "onnxruntime"}, lambda folder: None)
    assert (other / "notes.txt").read_text() == "keep"
    with (
        compile_engine(ranker, request_of(1), "torch") as engine,
        pytest.raises(BackendError, match=r"fastrec\.save"),
    ):
        engine.save(tmp_path / "torch")


def test_memory_is_in_megabytes():
    memory = memory_mb()
    assert 20 < memory["VmRSS"] <= memory["VmHWM"] < 20_000


def test_the_card_names_the_machine_and_nothing_private():
    card = machine_card()
    assert card["cores_usable"] >= 1
    assert card["memory_gb"] > 0
    assert card["packages"]["numpy"] == np.__version__
    text = json.dumps(card)
    import getpass
    import platform

    assert platform.node() not in text or len(platform.node()) < 3
    assert f'"{getpass.getuser()}"' not in text


def test_export_from_the_command_line(ranker, tmp_path):
    fastrec.save(ranker, tmp_path / "checkpoint")
    app = Typer()
    app.command()(cli.export)
    out, report = tmp_path / "model.onnx", tmp_path / "report.json"
    result = CliRunner().invoke(
        app,
        [str(tmp_path / "checkpoint"), str(out), "--candidates", "16", "--json", str(report)],
    )
    assert result.exit_code == 0, result.output
    assert onnx.load(out).graph.input[0].name == "item"
    assert json.loads(report.read_text())["inputs"]["cand_item"] == [2, 16]

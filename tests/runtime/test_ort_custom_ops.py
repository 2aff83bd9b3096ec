"""fastrec's kernels inside ONNX Runtime: the answers of torch, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fastrec
from fastrec.errors import BackendError
from fastrec.exporters.onnx import custom_ops as ort_custom_ops
from fastrec.exporters.onnx.custom_forms import CustomLinear
from fastrec.kernels import window_sparse_attention
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.models import Ranker
from fastrec.nn import SparseInt8Linear
from fastrec.runtime import load_engine

if (REASON := ort_custom_ops.reason_missing()) is not None:
    pytest.skip(REASON, allow_module_level=True)


def session_of(
    kind: str,
    inputs: dict[str, int],
    output: int,
    constants: dict[str, np.ndarray],
    attributes: dict[str, object],
    threads: int = 1,
) -> onnxruntime.InferenceSession:
    """One node as a session; ``inputs`` and ``output`` name element types."""
    node = helper.make_node(kind, [*inputs, *constants], ["y"], domain="fastrec", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, type_, None) for name, type_ in inputs.items()],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastrec", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    ort_custom_ops.register(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def layer_of(inputs: int, outputs: int, *, bias=True, activation=None, quantised=False):
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():  # some groups of 32 x 4 that are not stored
        for start in range(0, inputs, 12):
            linear.weight[:32, start : start + 4] = 0
    layer = SparseInt8Linear.from_float(
        linear, x_scale=0.02, x_zero_point=100, activation=activation
    )
    if quantised:
        layer.set_output_quantization(0.03, 7)
    return layer


def linear_session(layer: SparseInt8Linear, x_type: int, **changed: np.ndarray):
    form = CustomLinear(layer)
    names = ["values", "group_index", "panel_start", "w_scale"]
    names += [] if layer.bias is None else ["bias"]
    constants = {name: getattr(layer, name).numpy() for name in names} | changed
    return session_of(
        "SparseInt8LinearU8" if form.quantised else "SparseInt8Linear",
        {"x": x_type},
        TensorProto.UINT8 if form.quantised else TensorProto.FLOAT,
        constants,
        form.attributes,
        threads=2,
    )


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (15, 33), (64, 32), (260, 513)])
def test_a_layer_has_torchs_bits(inputs, outputs, quantised, activation):
    layer = layer_of(inputs, outputs, activation=activation, quantised=quantised, bias=inputs > 1)
    floats = linear_session(layer, TensorProto.FLOAT)
    codes = linear_session(layer, TensorProto.UINT8)
    for lead in ((0,), (1,), (17,), (3, 65)):
        x = torch.randn(*lead, inputs)
        u8 = torch.randint(0, 256, (*lead, inputs), dtype=torch.uint8)
        for session, given in ((floats, x), (codes, u8)):
            (y,) = session.run(None, {"x": given.numpy()})
            assert y.dtype == (np.uint8 if quantised else np.float32)
            np.testing.assert_array_equal(y, layer(given).numpy())


def test_a_nan_and_a_wrong_width_are_errors_and_the_session_goes_on():
    layer = layer_of(16, 32)
    session = linear_session(layer, TensorProto.FLOAT)
    with pytest.raises(Exception, match="NaN"):
        session.run(None, {"x": np.full((2, 16), np.nan, np.float32)})
    with pytest.raises(Exception, match="in_features"):
        session.run(None, {"x": np.zeros((2, 15), np.float32)})
    x = torch.randn(2, 16)
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], layer(x).numpy())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("group_index", lambda v: v + 1000, "indices of groups within"),
        ("group_index", lambda v: -v - 1, "indices of groups within"),
        ("panel_start", lambda v: v[::-1].copy(), "a start for each panel"),
        ("panel_start", lambda v: v + np.arange(len(v), dtype=v.dtype), "as many groups"),
        ("panel_start", lambda v: v[:-1].copy(), "a start for each panel|outputs"),
        ("values", lambda v: v[:-1].copy(), "128 values a group"),
        ("w_scale", lambda v: v.astype(np.float64), "Type .* is invalid"),
    ],
)
def test_a_weight_that_kernels_must_not_follow_is_refused(name, change, message):
    layer = layer_of(64, 40)
    with pytest.raises(Exception, match=message):
        linear_session(layer, TensorProto.FLOAT, **{name: change(getattr(layer, name).numpy())})


@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offsets", ["log2", [[9, 20], []]])
def test_attention_is_that_of_the_kernel(length, causal, offsets):
    pattern = AttentionPattern(3, offsets, causal)
    heads = 2
    lists = [pattern.distances(length, h) for h in range(heads if pattern.per_head else 1)]
    flat = [len(lists), *(n for d in lists for n in (len(d), *d))]
    attributes = {"window": 3, "causal": int(causal), "scale": 0.3, "pattern": flat}
    types = dict.fromkeys(("q", "k", "v"), TensorProto.FLOAT) | {"lengths": TensorProto.INT64}
    session = session_of("WindowSparseAttention", types, TensorProto.FLOAT, {}, attributes, 2)
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 4, heads, length, 9)
    lengths = torch.tensor([length, 1, 0, (length + 1) // 2])
    given = {"q": q, "k": k, "v": v, "lengths": lengths}
    (out,) = session.run(None, {name: t.numpy() for name, t in given.items()})
    want = window_sparse_attention(q, k, v, pattern, lengths=lengths, scale=0.3)
    np.testing.assert_array_equal(out, want.numpy())
    with pytest.raises(Exception, match="lengths"):
        session.run(None, {n: t.numpy() for n, t in (given | {"lengths": lengths + 1}).items()})


def test_a_broken_pattern_is_refused():
    types = dict.fromkeys(("q", "k", "v"), TensorProto.FLOAT)
    for pattern in ([0], [1, 2, 9], [1, 1, 3], [2, 1, 9], [1, 2, 9, 9], [1, 0, 5]):
        attributes = {"window": 3, "causal": 0, "scale": 1.0, "pattern": pattern}
        with pytest.raises(Exception, match="expected"):
            session_of("WindowSparseAttention", types, TensorProto.FLOAT, {}, attributes)


def test_a_pruned_int8_ranker_is_exported_compiled_saved_and_loaded(ranker, request_of, tmp_path):
    torch.manual_seed(1)
    model = Ranker(dataclasses.replace(ranker.config, tower=(128, 128))).eval()
    request = request_of(3)
    tensors = tuple(map(torch.from_numpy, request))
    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.4))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[tensors])
    with torch.inference_mode():
        want = model(*tensors).numpy()

    path = fastrec.export(model, tmp_path / "model.onnx", request, custom_ops=True)
    graph = onnx.load(path).graph
    ours = {node.op_type for node in graph.node if node.domain == "fastrec"}
    assert ours == {"SparseInt8Linear", "SparseInt8LinearU8"}
    assert not any(node.op_type == "DequantizeLinear" for node in graph.node)

    settings = {"custom_ops": "on"}
    engine = fastrec.compile(model, request, "onnxruntime", 2, settings=settings)
    assert "custom ops" in engine.describe()[0]["why"]
    # Norms and softmax between the layers are summed in another order, which may turn an integer.
    correctness_gate(want, engine(*request), Tolerance(noise=0.1)).require("custom ops")
    engine.save(tmp_path / "engine")
    with load_engine(tmp_path / "engine") as loaded:
        np.testing.assert_array_equal(loaded(*request), engine(*request))
    engine.close()


def test_what_was_not_built_is_said(monkeypatch, ranker, request_of):
    monkeypatch.setattr(ort_custom_ops, "__file__", str(Path("/nowhere/runtime/x.py")))
    assert "reinstall with FASTREC_BUILD_CPU=1" in str(ort_custom_ops.reason_missing())
    settings = {"custom_ops": "on"}
    with pytest.raises(BackendError, match="custom ops for ONNX Runtime were not built"):
        fastrec.compile(ranker, request_of(1), "onnxruntime", 1, settings=settings)

"""Models as TFLite files: torch's answers at every size, our int8 numbers, errors with a name."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastrec
from fastrec.errors import ArtifactError, BackendError, MissingDependencyError, ShapeError
from fastrec.exporters.model_spec import spec_of
from fastrec.exporters.tflite import graph as tflite_graph
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.models.encoder import EncoderConfig
from fastrec.runtime.backends import litert

pytestmark = pytest.mark.skipif(litert.can_run() is not None, reason=str(litert.can_run()))

Pattern = fastrec.AttentionPattern


def small(encoder: EncoderConfig | None = None) -> Ranker:
    torch.manual_seed(0)
    config = RankerConfig(
        n_items=300,
        n_categories=30,
        history_length=40,
        d=16,
        category_dim=8,
        n_heads=2,
        n_blocks=1,
        ffn=32,
        tower=(32, 32),
        encoder=encoder or EncoderConfig(),
    )
    return Ranker(config).eval()


def requests(model: nn.Module, **sizes: int) -> tuple[np.ndarray, ...]:
    return spec_of(model, ()).sample({"B": 2, **sizes}, seed=3)


def answers(model: nn.Module, request: tuple[np.ndarray, ...]) -> np.ndarray:
    with torch.inference_mode():
        scores: np.ndarray = model(*map(torch.from_numpy, request)).numpy()
    return scores


@pytest.mark.parametrize(
    "encoder",
    [
        EncoderConfig(),
        EncoderConfig(pattern=Pattern(window=4)),
        EncoderConfig(projection="grouped", ffn_projection="grouped", groups=2),
        EncoderConfig(projection="separable", groups=2),
        EncoderConfig(projection="low_rank", rank=4),
    ],
    ids=["dense", "sparse", "grouped", "separable", "low_rank"],
)
def test_every_layer_gives_torch_answers_at_every_size(encoder):
    model = small(encoder)
    settings = {"free_sizes": "all"}
    with fastrec.compile(model, requests(model, m=8), "litert", 1, settings=settings) as engine:
        for sizes in ({"B": 1, "L": 1, "m": 1}, {"B": 3, "L": 40, "m": 50}, {"L": 17, "m": 2}):
            request = requests(model, **sizes)
            gate = correctness_gate(
                answers(model, request), engine(*request), Tolerance.for_precision("fp32")
            )
            gate.require(str(sizes))


@pytest.mark.parametrize("free", ["batch", "all"])
def test_a_causal_model(free):
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(n_items=300, max_length=12, d=16)).eval()
    settings = {"free_sizes": free}
    with fastrec.compile(model, requests(model), "litert", 1, settings=settings) as engine:
        request = requests(model, B=5, **({"L": 7} if free == "all" else {}))
        np.testing.assert_allclose(engine(*request), answers(model, request), atol=1e-4)
        if free == "batch":
            with pytest.raises(ShapeError, match="item: expected shape"):
                engine(*requests(model, B=2, L=7))


def test_any_torch_model():
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = torch.sigmoid(x[..., 1:9:2]) * x[..., 10:14].abs()
            mean, best = x.mean(-1, keepdim=True), x.amax(-1, keepdim=True)
            return torch.where(gate > 0.3, gate.exp(), mean) - best.clamp(-1, 1)

    x = torch.randn(3, 5, 16)
    with fastrec.compile(Own(), (x,), "litert", 1) as engine:
        torch.testing.assert_close(engine(x), Own()(x), rtol=1e-5, atol=1e-5)


def quantised(model: Ranker) -> Ranker:
    batch = tuple(map(torch.from_numpy, requests(model, B=16, m=8)))
    fastrec.quantize_(model, fastrec.Int8(), [batch])
    return model


@pytest.mark.parametrize("form", ["float", "kernels"])
def test_an_int8_model_keeps_its_scales_and_weights(form, tmp_path):
    model = quantised(small())
    examples = requests(model, m=8)
    with fastrec.compile(model, examples, "litert", 1, settings={"int8": form}) as engine:
        assert engine.precision == "int8"
        expected = answers(model, examples)
        # One input in some thousand turns its rounding; a step of 255 of the widest layer.
        assert np.abs(engine(*examples) - expected).max() < 0.02 * np.abs(expected).max()
        path = engine.save(tmp_path / "engine")
    schema = tflite_graph.schema()
    file = (path / "model.tflite").read_bytes()
    stored = schema.ModelT.InitFromPackedBuf(bytearray(file), 0)
    tensors = [t for t in stored.subgraphs[0].tensors if t.type == schema.TensorType.INT8]

    def scales(tensor: Any) -> np.ndarray:
        return np.asarray([] if tensor.quantization is None else tensor.quantization.scale)

    layers = [m for m in model.modules() if isinstance(m, fastrec.nn.SparseInt8Linear)]
    for layer in layers:
        weight = layer.packed.unpack().numpy()
        assert any(
            list(t.shape) == list(weight.shape)
            and np.array_equal(scales(t), layer.w_scale.numpy())
            and np.array_equal(stored.buffers[t.buffer].data.view(np.int8), weight.reshape(-1))
            for t in tensors
        )
        zero = int(layer.x_zero_point) - 128
        assert any(
            scales(t).tolist() == [float(layer.x_scale)] and t.quantization.zeroPoint[0] == zero
            for t in tensors
        )
    # A layer that hands on integers needs no float between itself and the next one.
    linear = schema.BuiltinOperator.FULLY_CONNECTED
    codes = [code.builtinCode for code in stored.operatorCodes]
    all_tensors = stored.subgraphs[0].tensors
    whole = [
        o
        for o in stored.subgraphs[0].operators
        if codes[o.opcodeIndex] == linear
        and all_tensors[o.outputs[0]].type == schema.TensorType.INT8
    ]
    chained = sum(m.out_scale is not None and m.activation != "gelu" for m in layers)
    assert len(whole) == (chained if form == "kernels" else 0)
    assert chained > 0


def test_inputs_are_rounded_as_the_kernels_do():
    """x * (1 / scale) is rounded, then the zero point added: every integer is the kernels'."""
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data = torch.eye(64)
    layer = fastrec.nn.SparseInt8Linear.from_float(linear, x_scale=0.037, x_zero_point=139)
    model = nn.Sequential(layer).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 64, generator=generator) * 1.5
    with fastrec.compile(model, (x,), "litert", 1) as engine:
        got = engine(x)
    assert torch.equal((got / 0.037).round(), (model(x) / 0.037).round())


def test_the_file_says_what_it_takes(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model = small()
    with fastrec.compile(model, requests(model, m=8), "litert", 1, precision="fp16") as engine:
        half = engine.save(tmp_path / "half") / "model.tflite"
    with fastrec.compile(model, requests(model, m=8), "litert", 1) as engine:
        full = engine.save(tmp_path / "full") / "model.tflite"
    saved = full.stat().st_size - half.stat().st_size
    assert saved > model.item_embedding.weight.numel() * 2 - 1000  # what float16 adds in operators
    runner = Interpreter(str(full)).get_signature_runner()
    assert set(runner.get_input_details()) == set(spec_of(model, ()).names)
    request = requests(model, m=8)
    narrow = [a.astype(np.int32) for a in request]
    scores = runner(**dict(zip(spec_of(model, ()).names, narrow, strict=True)))["scores"]
    np.testing.assert_allclose(scores, answers(model, request), atol=1e-4)
    schema = tflite_graph.schema()
    stored = schema.ModelT.InitFromPackedBuf(bytearray(full.read_bytes()), 0)
    (note,) = stored.metadata
    about = json.loads(stored.buffers[note.buffer].data.tobytes())
    assert [f["name"] for f in about["inputs"]["fields"]] == list(spec_of(model, ()).names)


def test_calls_from_many_threads():
    model = small()
    with fastrec.compile(model, requests(model, m=8), "litert", 1) as engine:
        batches = [requests(model, B=b, m=8) for b in (1, 2, 3, 2, 1, 4)] * 4
        expected = [answers(model, request) for request in batches]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda request: engine(*request), batches))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(BackendError, match="is closed"):
        engine(*batches[0])


def test_what_is_no_tflite_file(tmp_path):
    file = tmp_path / "model.tflite"
    for content in (b"", b"not a model", b"\0" * 64):
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match="LiteRT cannot read"):
            litert.open_interpreter(file, threads=1)
    with pytest.raises(ArtifactError, match="LiteRT cannot read"):
        litert.open_interpreter(tmp_path / "none.tflite", threads=1)


def test_what_a_tflite_file_cannot_hold(monkeypatch):
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    with pytest.raises(BackendError, match="ONNX operator TopK has no TFLite form"):
        fastrec.compile(Sorted(), (torch.randn(2, 4),), "litert", 1)
    monkeypatch.setattr(tflite_graph, "LARGEST_BYTES", 1000)
    model = small()
    with pytest.raises(BackendError, match=r"GB and a TFLite file at most 2: quantise"):
        fastrec.compile(model, requests(model, m=8), "litert", 1)


def test_without_the_package(monkeypatch, tmp_path):
    model = small()
    with fastrec.compile(model, requests(model, m=8), "litert", 1) as engine:
        path: Path = engine.save(tmp_path / "engine")
    monkeypatch.setattr(litert, "missing", lambda module: module == "ai_edge_litert")
    with pytest.raises(MissingDependencyError, match=r"fastrec-kernels\[litert\]"):
        fastrec.compile(model, requests(model, m=8), "litert", 1)
    with pytest.raises(BackendError, match=r"pip install 'fastrec-kernels\[litert\]'"):
        fastrec.runtime.load_engine(path)

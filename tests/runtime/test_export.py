"""fastrec's layers in standard ONNX: the decompositions, int8 as QDQ, and engines that run them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import fastrec
from fastrec import export, kernels
from fastrec.errors import BackendError
from fastrec.exporters.model_spec import spec_of
from fastrec.exporters.onnx.forms import DECOMPOSITIONS
from fastrec.exporters.onnx.session import open_session
from fastrec.exporters.onnx.sparse_attention import sparse_attention
from fastrec.models import Ranker, RankerConfig
from fastrec.models.encoder import EncoderConfig
from fastrec.runtime.backends import openvino
from fastrec.runtime.backends._openvino_rounding import round_before_quantising

Pattern = fastrec.AttentionPattern
ops = torch.ops.fastrec


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(window=0),
        Pattern(window=3),
        Pattern(window=3, offsets="none", causal=True),
        Pattern(window=5, offsets="strided:7", causal=True),
        Pattern(window=2, offsets=[[5], [9, 11]]),
        Pattern(window=1, offsets="random", num_random=3, max_length=20),
        Pattern(window=100),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 9, 16, 33])
def test_sparse_attention_out_of_slices_is_the_kernel(pattern, length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 4, 2, length, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([0, 1, (length + 1) // 2, length])
    for valid in (None, lengths):
        expected = kernels.window_sparse_attention(q, k, v, pattern, lengths=valid, scale=0.3)
        got = sparse_attention(q * 0.3, k, v, pattern, valid)
        # float64: what is left is some hundred roundings of numbers near 1.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_work_is_linear_in_the_length():
    """Elements of the largest tensor, twice the length apart."""

    def largest(length: int) -> int:
        x = torch.zeros(1, 1, length, 4, device="meta")
        sizes: list[int] = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    sizes.append(out.numel())
                return out

        with Sizes():
            sparse_attention(x, x, x, Pattern(window=8), None)
        return max(sizes)

    assert largest(2048) < 2.2 * largest(1024)


@pytest.mark.parametrize("shuffle", [False, True])
def test_grouped_linear_in_aten(shuffle):
    x, weight, bias = torch.randn(3, 5, 12), torch.randn(3, 2, 4), torch.randn(6)
    got = DECOMPOSITIONS[ops.grouped_linear.default](x, weight, bias, shuffle)
    torch.testing.assert_close(got, ops.grouped_linear(x, weight, bias, shuffle))


@pytest.mark.parametrize("causal", [False, True])
def test_separable_projection_in_aten(causal):
    x, taps = torch.randn(2, 7, 6), torch.randn(6, 3)
    weight, bias, lengths = torch.randn(2, 4, 3), torch.randn(8), torch.tensor([0, 5])
    got = DECOMPOSITIONS[ops.separable_projection.default](x, taps, weight, bias, lengths, causal)
    expected = ops.separable_projection(x, taps, weight, bias, lengths, causal)
    torch.testing.assert_close(got, expected)


def test_tables_and_padded_attention_in_aten():
    table, scale = torch.randint(-127, 128, (9, 4), dtype=torch.int8), torch.rand(9)
    ids = torch.tensor([[0, 8], [3, 3]])
    got = DECOMPOSITIONS[ops.int8_embedding.default](ids, table, scale)
    assert torch.equal(got, ops.int8_embedding(ids, table, scale))
    q, k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    for lengths in (None, torch.tensor([0, 4])):
        got = DECOMPOSITIONS[ops.padded_attention.default](q, k, v, lengths=lengths)
        torch.testing.assert_close(got, ops.padded_attention(q, k, v, lengths=lengths))


def quantised(encoder: EncoderConfig) -> Ranker:
    torch.manual_seed(0)
    config = RankerConfig(
        n_items=1200,
        n_categories=30,
        history_length=40,
        d=16,
        category_dim=8,
        n_heads=2,
        n_blocks=1,
        ffn=32,
        tower=(32, 32),
        encoder=encoder,
    )
    model = Ranker(config).eval()
    batch = spec_of(model, ()).sample({"B": 16, "m": 8})
    fastrec.quantize_(model, fastrec.Int8(), [tuple(map(torch.from_numpy, batch))])
    return model


def test_a_quantised_model_is_qdq_with_its_own_numbers_and_free_sizes(tmp_path):
    model = quantised(EncoderConfig(pattern=Pattern(window=4)))
    spec = spec_of(model, ())
    path = export(model, tmp_path / "model.onnx", spec.sample({"B": 2, "m": 8}))
    proto = onnx.load(path)
    kinds = Counter(node.op_type for node in proto.graph.node)
    layers = [m for m in model.modules() if isinstance(m, fastrec.nn.SparseInt8Linear)]
    handed_on = sum(layer.out_scale is not None for layer in layers)
    # One weight and one input a call; the categories' layer is called twice. A layer that hands on
    # uint8 quantises its output in place of the next one's input.
    calls = len(layers) + 1
    assert kinds["DequantizeLinear"] == 2 * calls
    assert kinds["QuantizeLinear"] == calls
    assert handed_on > 0
    # Each weight and zero point has one reader: ONNX Runtime renames them one by one.
    int8 = {t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    reads = Counter(i for n in proto.graph.node if n.op_type != "Gather" for i in n.input)
    assert all(reads[name] == 1 for name in int8 & reads.keys())
    held = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer]
    for layer in layers:
        weight = layer.packed.unpack().t().numpy()
        assert any(a.dtype == np.int8 and np.array_equal(a, weight) for a in held)
    table = model.item_embedding.weight.numpy()
    assert any(a.dtype == np.int8 and np.array_equal(a, table) for a in held)
    shapes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in proto.graph.input]
    assert shapes == [["B", "L"]] * 3 + [["B"]] + [["B", "m"]] * 2

    session = open_session(path, threads=1)
    for sizes in ({"B": 1, "L": 1, "m": 1}, {"B": 3, "L": 40, "m": 50}, {"B": 2, "L": 17, "m": 2}):
        request = spec.sample(sizes, seed=5)
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, request)).numpy()
        got = session.run(None, dict(zip(spec.names, request, strict=True)))[0]
        # One input in some thousand turns its rounding; a step of 255 of the widest layer.
        assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_run_what_quantize_made(backend, tmp_path, monkeypatch):
    rewritten = []
    monkeypatch.setattr(
        openvino,
        "round_before_quantising",
        lambda converted: rewritten.append(round_before_quantising(converted)),
    )
    model = quantised(EncoderConfig(projection="grouped", groups=2))
    spec = spec_of(model, ())
    examples = spec.sample({"B": 2, "m": 8})
    with fastrec.compile(model, examples, backend, 1) as engine:
        assert engine.precision == "int8"
        if backend == "openvino":  # each call of a layer; the categories' is called twice
            layers = [m for m in model.modules() if isinstance(m, fastrec.nn.SparseInt8Linear)]
            assert rewritten == [len(layers) + 1]
        scores = engine(*examples)
        path = engine.save(tmp_path / "engine")
    with torch.inference_mode():
        expected = model(*map(torch.from_numpy, examples)).numpy()
    assert np.abs(scores - expected).max() < 0.02 * np.abs(expected).max()
    with fastrec.runtime.load_engine(path) as loaded:
        assert np.array_equal(loaded(*examples), scores)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "litert"])
def test_quantising_twice_is_refused(backend):
    model = quantised(EncoderConfig())
    examples = spec_of(model, ()).sample({"B": 2, "m": 8})
    with pytest.raises(BackendError, match="is quantised already: leave precision at None"):
        fastrec.compile(model, examples, backend, 1, precision="int8")


def one_layer(weight: torch.Tensor, x_scale: float, x_zero_point: int) -> torch.nn.Module:
    """One int8 layer whose weight's integers are 127 wherever ``weight`` is its largest."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    make = fastrec.nn.SparseInt8Linear.from_float
    return torch.nn.Sequential(make(linear, x_scale=x_scale, x_zero_point=x_zero_point)).eval()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "litert"])
def test_the_largest_products_do_not_saturate(backend):
    """Pairs of 255 * 127 leave int16, in which CPUs without VNNI add them."""
    model = one_layer(torch.full((32, 64), 0.5), 0.01, 0)
    x = torch.full((3, 64), 2.55)
    with fastrec.compile(model, (x,), backend, 1) as engine:
        got = engine(x)
    # 64 products of 255 * 127, times two scales: a handful of float32 roundings.
    torch.testing.assert_close(got, torch.full((3, 32), 64 * 2.55 * 0.5), rtol=1e-6, atol=0)


def test_openvino_rounds_inputs_as_the_kernels_do():
    """x * (1 / scale) is rounded, then the zero point added: every integer is the kernels'."""
    model = one_layer(torch.eye(64), 0.037, 139)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 64, generator=generator) * 1.5
    with fastrec.compile(model, (x,), "openvino", 1) as engine:
        got = engine(x)
    step = 0.037
    assert torch.equal((got / step).round(), (model(x) / step).round())
    assert (got - model(x)).abs().max() < 1e-4 * step

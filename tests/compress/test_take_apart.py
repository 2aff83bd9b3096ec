"""torch's attention and encoder layers under ``quantize_``."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastrec
from fastrec.compress import QAT, BlockPruning, Int8, load, prune_, quantize_, save, sensitivity
from fastrec.errors import ArgumentError
from fastrec.kernels._compiled import reason_missing
from fastrec.nn import MultiheadAttention, SparseInt8Linear


class Bst(nn.Module):
    """A padded history through torch's encoder, then a head."""

    def __init__(self, activation: str = "gelu", nested: bool = False) -> None:
        super().__init__()
        self.items = nn.Embedding(2000, 32)
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.1, activation, batch_first=True, norm_first=not nested
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(32, 1)

    def forward(self, history: Tensor) -> Tensor:
        x = self.encoder(self.items(history), src_key_padding_mask=history == 0)
        return self.head(x[:, 0]).squeeze(-1)


def histories(seed: int = 0, rows: int = 64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(1, 2000, (rows, 12), generator=draw)
    length = torch.randint(1, 13, (rows, 1), generator=draw)
    return found.masked_fill(torch.arange(12) >= length, 0)


def made(activation: str = "gelu", nested: bool = False) -> Bst:
    torch.manual_seed(0)
    return Bst(activation, nested).eval()


INSIDE = [
    f"encoder.layers.{n}.{part}"
    for n in range(2)
    for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
        "linear1", "linear2",
    )
]  # fmt: skip


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("nested", [False, True])
def test_all_of_an_encoder_becomes_int8(activation: str, nested: bool) -> None:
    model = made(activation, nested)
    before = copy.deepcopy(model)
    before.encoder.use_nested_tensor = False  # torch warns of them
    report = quantize_(model, Int8(), calibration=[histories()])
    assert list(report.layers) == INSIDE
    assert report.left == {}
    for n in range(2):
        first = report.layers[f"encoder.layers.{n}.linear1"]
        assert (first.activation, first.output) == (activation, "uint8")
    with torch.inference_mode():
        asked = histories(1)
        assert correlation(model(asked), before(asked)) > 0.99


def test_the_engine_gives_the_models_answers() -> None:
    if (reason := reason_missing()) is not None:
        pytest.skip(reason)
    model = made()
    quantize_(model, Int8(), calibration=[histories()])
    with fastrec.compile(model, (histories(),), "native", 1, fallback="error") as engine:
        kinds = [row["op"] for row in engine.describe()]
        # q, k and v as one product: 4 a layer.
        assert kinds.count("sparse_int8_linear") == 8
        asked = histories(2, rows=9)
        with torch.inference_mode():
            torch.testing.assert_close(engine(asked), model(asked), rtol=1e-2, atol=1e-2)


def test_a_saved_model_loads_into_a_float_one(tmp_path: Path) -> None:
    model = made()
    quantize_(model, Int8(), calibration=[histories()])
    save(model, tmp_path / "int8")
    again = load(tmp_path / "int8", made())
    with torch.inference_mode():
        assert torch.equal(again(histories(1)), model(histories(1)))


def test_names_choose_projections_and_the_rest_stays_torchs() -> None:
    model = made()
    names = ["encoder.layers.1.self_attn.q_proj", "encoder.layers.1.linear2"]
    report = quantize_(model, Int8(), [histories()], names)
    assert list(report.layers) == names
    # torch may read the weights of the whole stack for one fused call: it is apart as one.
    assert isinstance(model.encoder.layers[0].self_attn, MultiheadAttention)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(32, 4, batch_first=True)
            self.second = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x, x, x, need_weights=False)[0]
            return self.second(x, x, x)[0]

    two = Two().eval()
    quantize_(two, Int8(), [torch.randn(4, 5, 32)], "second")
    assert type(two.first) is nn.MultiheadAttention
    assert isinstance(two.second.out_proj, SparseInt8Linear)


def test_a_failure_and_a_measurement_leave_the_model_as_it_was() -> None:
    model = made()
    before = {name: type(m) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    activation = model.encoder.layers[0].activation
    with pytest.raises(ArgumentError, match="calibration"):
        quantize_(model, Int8())
    with pytest.raises(ArgumentError, match="filter_fn"):
        quantize_(model, Int8(), [histories()], "nothing")
    found = sensitivity(
        model, lambda m: float(m(histories()).var()), quantize=Int8(), calibration=[histories()]
    )
    assert set(INSIDE) <= set(found.layers)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert model.encoder.layers[0].activation is activation


def test_quantisation_aware_training_reaches_inside() -> None:
    model = made().train()
    report = quantize_(model, QAT("prepare"), calibration=[histories()])
    assert set(INSIDE) <= set(report.prepared)
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    before = model.encoder.layers[0].self_attn.q_proj.weight.detach().clone()
    for seed in range(2):
        optimiser.zero_grad()
        model(histories(seed)).square().mean().backward()
        optimiser.step()
    assert not torch.equal(model.encoder.layers[0].self_attn.q_proj.weight, before)
    model.eval()
    converted = quantize_(model, QAT("convert"))
    assert set(INSIDE) <= set(converted.layers)
    assert converted.layers["encoder.layers.0.linear1"].output == "uint8"


def test_attention_that_cannot_be_taken_apart_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True)
            self.out = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    report = quantize_(Odd().eval(), Int8(), [torch.randn(2, 5, 32)])
    assert list(report.layers) == ["out"]
    assert "add_bias_kv" in report.left["attention"]


def test_a_model_that_reads_the_weight_itself_is_refused() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4)
            self.out = nn.Linear(96, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.nn.functional.linear(x, self.attention.in_proj_weight))

    model = Reader().eval()
    with pytest.raises(ArgumentError, match="leave this one out by filter_fn"):
        quantize_(model, Int8(), [torch.randn(2, 32)])
    assert type(model.attention) is nn.MultiheadAttention
    report = quantize_(model, Int8(), [torch.randn(2, 32)], "out")
    assert list(report.layers) == ["out"]


def test_pruning_reaches_the_projections_and_int8_skips_what_it_pruned() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    weight = model.layers[0].self_attn.in_proj_weight
    with torch.no_grad():
        weight *= 0.8  # torch begins it larger than the other layers
    report = prune_(model, BlockPruning(sparsity=0.4, rounds=1))
    assert "layers.0.self_attn.in_proj_weight" in report.layers
    assert report.sparsity == pytest.approx(0.4, abs=0.01)
    assert float((weight == 0).float().mean()) > 0.2
    quantised = quantize_(model, Int8(), [torch.randn(4, 9, 128)])
    density = [quantised.layers[f"layers.0.self_attn.{n}_proj"].density for n in "qkv"]
    assert sum(density) / 3 == pytest.approx(1 - float((weight == 0).float().mean()), abs=0.02)


def test_a_function_is_not_asked_of_attention() -> None:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    report = prune_(layer, BlockPruning(sparsity=0.4, rounds=1), lambda m, n: m.out_features > 64)
    assert set(report.layers) == {"self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}


class PointwiseFeedForward(nn.Module):
    """SASRec's feed-forward part as convolutions of kernel 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(32, 48, kernel_size=1)
        self.conv2 = nn.Conv1d(48, 32, kernel_size=1, bias=False)
        self.wide = nn.Conv1d(32, 32, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return self.wide(self.conv2(torch.relu(self.conv1(y)))).transpose(1, 2)


def test_convolutions_of_kernel_1_become_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = PointwiseFeedForward().eval(), torch.randn(8, 6, 32)
    expected = model(x)
    report = quantize_(model, Int8(), [x])
    assert list(report.layers) == ["conv1.linear", "conv2.linear"]
    assert list(report.left) == ["wide"]
    with torch.no_grad():
        assert correlation(model(x).flatten(), expected.flatten()) > 0.99
        save(model, tmp_path / "int8")
        again = load(tmp_path / "int8", PointwiseFeedForward())
        assert torch.equal(again(x), model(x))
    if reason_missing() is None:
        with fastrec.compile(model, (x,), "native", 1, fallback="error") as engine:
            torch.testing.assert_close(engine(x), model(x).detach(), rtol=1e-2, atol=1e-2)

"""Models of fastrec.nn's modules: saved, pruned, quantised; what stays float is named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastrec
from fastrec import AttentionPattern
from fastrec.compress import QAT, BlockPruning, Int8, prune_, quantize_
from fastrec.kernels._compiled import reason_missing
from fastrec.models import EncoderConfig, SASRec, SASRecConfig
from fastrec.nn import (
    GroupedLinear,
    LowRankLinear,
    SeparableInt8Projection,
    SeparableProjection,
    SparseInt8Linear,
)

NARROW = AttentionPattern(window=2)
ENCODERS = {
    "window": EncoderConfig(NARROW),
    "grouped": EncoderConfig(NARROW, "grouped", "grouped", groups=4),
    "separable": EncoderConfig(NARROW, "separable"),
    "low rank": EncoderConfig(NARROW, "low_rank", "low_rank", rank=32),
}


def make(name: str) -> SASRec:
    torch.manual_seed(0)
    config = SASRecConfig(n_items=1200, max_length=12, d=64, ffn=64, encoder=ENCODERS[name])
    return SASRec(config).eval()


def inputs() -> tuple[Tensor, Tensor]:
    items = torch.randint(1, 1200, (4, 12), generator=torch.Generator().manual_seed(0))
    return items, torch.full((4,), 12)


@pytest.mark.parametrize("name", ENCODERS)
def test_saved_float_and_quantised_models_come_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    fastrec.save(model, tmp_path / "float")
    loaded = fastrec.load(tmp_path / "float")
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()), model(*inputs()))
    quantize_(model, Int8(), [inputs()], lambda m, n: True)
    fastrec.save(model, tmp_path / "int8")
    loaded = fastrec.load(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()), model(*inputs()))


@pytest.mark.parametrize("name", ENCODERS)
def test_their_layers_are_pruned_and_trained_quantised(name: str) -> None:
    model = make(name)
    config = BlockPruning(0.4, block=(16, 4), embedding_block=None)
    report = prune_(model, config, lambda m, n: True)
    assert report.sparsity == pytest.approx(0.4, abs=0.01)
    parts = (".down", ".up") if name == "low rank" else ("",)
    wanted = {f"blocks.0.attention.{p}{q}" for p in ("in_proj", "out_proj") for q in parts}
    weight = "pointwise" if name == "separable" else "weight"
    assert {f"{w}.{weight}" for w in wanted} <= set(report.layers)
    quantize_(model, QAT("prepare"), [inputs()])
    model.train()(*inputs()).square().mean().backward()
    for w in wanted:
        trained = getattr(model.get_submodule(w), weight)
        assert bool((trained.grad[trained == 0] == 0).all())
        assert bool((trained.grad != 0).any())
    model.eval()
    with torch.no_grad():
        reference = copy.deepcopy(model)(*inputs())
    left = quantize_(model, QAT("convert")).left
    assert not left
    kind = SeparableInt8Projection if name == "separable" else SparseInt8Linear
    assert all(isinstance(model.get_submodule(w), kind) for w in wanted)
    with torch.no_grad():
        # Codes that fall on another side of a rounding: a few hundredths of normed states.
        torch.testing.assert_close(model(*inputs()), reference, atol=0.1, rtol=0.05)


def test_what_cannot_be_replaced_is_named_with_the_reason() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(32, 32), Scaled(32, 32))
    left = quantize_(model, Int8(), [torch.randn(8, 32)]).left
    assert list(left) == ["1"]
    assert "Scaled" in left["1"]
    convolution = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(14, 32))
    left = quantize_(convolution, Int8(), [torch.randn(2, 8, 16)]).left
    assert "Conv1d" in left["0"]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64, 2), (24, 40, 4), (15, 51, 3)])
def test_an_int8_grouped_layer_is_the_float_one_rounded(
    sizes: tuple[int, int, int], shuffle: bool
) -> None:
    torch.manual_seed(1)
    inputs_, outputs, groups = sizes
    layer = GroupedLinear(inputs_, outputs, groups, shuffle=shuffle)
    x = torch.randn(40, inputs_)
    model = nn.Sequential(layer)
    expected = model(x).detach()
    report = quantize_(model, Int8("minmax"), [x])
    packed = model[0]
    # Half a step of the input times the weights, and half a step of the weights times the input.
    rows = layer.weight.detach().abs().sum(2).amax()
    limit = report.layers["0"].x_scale / 2 * rows + 0.5 / 127 * float(
        layer.weight.detach().abs().amax()
    ) * float(x.abs().sum(1).max())
    assert float((model(x) - expected).abs().max()) <= float(limit)
    if sizes == (64, 64, 2) and not shuffle:
        assert packed.density == 0.5  # the other group's inputs are not even stored


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_an_int8_separable_layer_is_the_float_one_rounded(groups: int, causal: bool) -> None:
    torch.manual_seed(2)
    layer = SeparableProjection(32, 48, 3, groups, causal=causal)
    x, lengths = torch.randn(3, 9, 32), torch.tensor([9, 4, 0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x, lengths)

    model = Model()
    expected = model(x, lengths).detach()
    report = quantize_(model, Int8("minmax"), [(x, lengths)])
    scale = report.layers["layer"].x_scale
    rows = layer.pointwise.detach().abs().sum(2).amax()
    hidden = 32 // groups * 255 * scale  # no input sums to more
    peak = float(layer.pointwise.detach().abs().amax())
    with torch.no_grad():
        result = model(x, lengths)
    assert float((result - expected).abs().max()) <= scale / 2 * rows + 0.5 / 127 * peak * hidden
    assert float(result[1, 4:].abs().max()) == 0
    assert float(result[2].abs().max()) == 0


def test_a_low_rank_layer_is_one_chain_of_integers() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(LowRankLinear(48, 64, 16), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = torch.randn(64, 48)
    expected = model(x).detach()
    report = quantize_(model, Int8(), [x])
    assert {n: r.output for n, r in report.layers.items()} == {
        "0.down": "uint8",
        "0.up": "uint8",
        "2": "float32",
    }
    assert report.layers["0.up"].activation == "relu"
    assert float((model(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["grouped", "separable", "low rank"])
def test_the_native_engine_runs_their_int8_layers(name: str) -> None:
    if (reason := reason_missing()) is not None:
        pytest.skip(reason)
    model = make(name)
    quantize_(model, Int8(), [inputs()])
    settings = {"executor": "plan"}
    engine = fastrec.compile(model, inputs(), backend="native", settings=settings)
    with torch.no_grad():
        expected = model(*inputs())
    # The same integers; what is left are the last bits of norms and softmax.
    assert float((engine(*inputs()) - expected).abs().max()) <= 1e-3 * float(expected.abs().max())

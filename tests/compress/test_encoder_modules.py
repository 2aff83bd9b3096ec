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
from fastrec.models import EncoderConfig, SASRec, SASRecConfig
from fastrec.nn import SparseInt8Linear

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


@pytest.mark.parametrize("name", ["window", "low rank"])
def test_their_linear_layers_are_pruned_and_trained_quantised(name: str) -> None:
    model = make(name)
    report = prune_(model, BlockPruning(0.4, embedding_block=None), lambda m, n: True)
    parts = (".down", ".up") if name == "low rank" else ("",)
    wanted = {f"blocks.0.attention.{p}{q}" for p in ("in_proj", "out_proj") for q in parts}
    assert {f"{w}.weight" for w in wanted} <= set(report.layers)
    quantize_(model, QAT("prepare"), [inputs()])
    model.train()(*inputs()).square().mean().backward()
    assert all(model.get_submodule(w).weight.grad is not None for w in wanted)
    model.eval()
    with torch.no_grad():
        reference = copy.deepcopy(model)(*inputs())
    quantize_(model, QAT("convert"))
    assert all(isinstance(model.get_submodule(w), SparseInt8Linear) for w in wanted)
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
    left = quantize_(make("separable"), Int8(), [inputs()]).left
    assert "SeparableProjection" in left["blocks.0.attention.in_proj"]

    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.Sequential(nn.Linear(32, 32), layer).eval()
    left = quantize_(model, Int8(), [torch.randn(2, 5, 32)]).left
    assert {"1.self_attn", "1.linear1", "1.linear2"} <= set(left)

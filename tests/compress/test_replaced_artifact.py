"""Models whose layers replace_ swapped are saved, and loaded into their own class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fastrec
from fastrec import AttentionPattern, Grouped, LowRank, WindowSparse
from fastrec.errors import ArtifactError
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import GroupedLinear, LowRankLinear, SparseInt8Linear, WindowSparseAttention

CONFIG = RankerConfig(n_items=1200, n_categories=20, history_length=8, d=32, ffn=64, tower=(64, 64))


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, high, (3, 8), generator=generator) for high in (1200, 20, 5)]
    cand = [torch.randint(1, high, (3, 5), generator=generator) for high in (1200, 20)]
    return [*ids, torch.tensor([8, 3, 1]), *cand]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_ranker_with_replaced_layers(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    model = Ranker(CONFIG).eval()
    fastrec.replace_(model, WindowSparse(AttentionPattern(window=2, offsets=(5,))))
    fastrec.replace_(model, LowRank(8), "tower.0")
    fastrec.replace_(model, LowRank(8), "blocks.0.attention.in_proj")
    fastrec.replace_(model, Grouped(2, shuffle=True), "blocks.1.ffn.0")
    if precision == "int8":
        fastrec.quantize_(model, fastrec.Int8(), [tuple(inputs())])
    fastrec.save(model, tmp_path / "model")
    again = fastrec.load(tmp_path / "model")
    assert isinstance(again.blocks[0].attention, WindowSparseAttention)
    assert again.blocks[0].attention.pattern.offsets == (5,)
    assert isinstance(again.tower[0], LowRankLinear)
    assert isinstance(again.blocks[0].attention.in_proj, LowRankLinear)
    kind = GroupedLinear if precision == "fp32" else SparseInt8Linear
    assert isinstance(again.blocks[1].ffn[0], kind)
    with torch.no_grad():
        assert torch.equal(again(*inputs()), model(*inputs()))


def test_torchs_attention_in_a_model_of_the_users(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()

    model, x = fresh(), torch.randn(2, 9, 32)
    fastrec.replace_(model, WindowSparse(AttentionPattern(window=3), qk_rank=4))
    fastrec.save(model, tmp_path / "model")
    again = fastrec.load(tmp_path / "model", fresh())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    # An encoder layer calls all of its layers once its attention is ours: they can be INT8.
    report = fastrec.quantize_(model, fastrec.Int8(), [x])
    assert set(report.layers) == {
        "0.self_attn.in_proj", "0.self_attn.out_proj", "0.linear1", "0.linear2"
    }  # fmt: skip
    fastrec.save(model, tmp_path / "model")
    again = fastrec.load(tmp_path / "model", fresh())
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    with pytest.raises(ArtifactError, match=r"cannot become|no module"):
        fastrec.load(tmp_path / "model", nn.Sequential(nn.Linear(32, 32)))

"""replace_: cheaper layers in trained models; what is left alone is listed with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrec import AttentionPattern
from fastrec.compress import Grouped, LowRank, WindowSparse, replace_
from fastrec.errors import ArgumentError, DtypeError
from fastrec.models import SASRec, SASRecConfig
from fastrec.nn import GroupedLinear, LowRankLinear, WindowSparseAttention


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))


def test_low_rank_where_it_is_cheaper() -> None:
    model, x = mlp(), torch.randn(5, 64)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 8) @ torch.randn(8, 64))
    expected = model(x)
    report = replace_(model, LowRank(8))
    assert report.replaced == {"0": "LowRankLinear"}
    assert "no cheaper" in report.left["2"]
    assert report.parameters[1] < report.parameters[0]
    # A weight of rank 8 loses nothing but the SVD's float32 rounding.
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert isinstance(model[0], LowRankLinear)


def test_grouped_where_the_groups_divide() -> None:
    model = mlp()
    report = replace_(model, Grouped(4))
    assert isinstance(model[0], GroupedLinear)
    assert "do not divide" in report.left["2"]


def test_a_wide_window_changes_nothing_and_sasrec_stays_causal() -> None:
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(n_items=50, max_length=10, d=16, ffn=16)).eval()
    items, length = torch.randint(1, 50, (3, 10)), torch.full((3,), 10)
    with torch.no_grad():
        expected = model(items, length)
        report = replace_(model, WindowSparse(AttentionPattern(window=10)))
        assert set(report.replaced.values()) == {"WindowSparseAttention"}
        result = model(items, length)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        items[:, -1] = 1 + items[:, -1] % 49
        torch.testing.assert_close(model(items, length)[:, :-1], result[:, :-1])


def test_torchs_attention_is_replaced_inside_its_encoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 9, 32)
    expected = model(x).detach()
    replace_(model, WindowSparse(AttentionPattern(window=9), qk_rank=8), "0.self_attn")
    assert isinstance(layer.self_attn, WindowSparseAttention)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_refused_untouched() -> None:
    model = mlp()
    with pytest.raises(DtypeError, match="config"):
        replace_(model, nn.Linear)
    with pytest.raises(ArgumentError, match="filter_fn"):
        replace_(model, LowRank(8), "7")
    with pytest.raises(ArgumentError, match="no cheaper"):
        replace_(model, LowRank(60))
    with pytest.raises(ArgumentError, match="no such layer"):
        replace_(model, WindowSparse())
    with pytest.raises(ArgumentError, match="rank"):
        LowRank(0)
    with pytest.raises(ArgumentError, match="groups"):
        Grouped(1)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]

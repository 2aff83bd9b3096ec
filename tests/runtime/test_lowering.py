"""Ops of users' own models against torch: attention under masks, reductions, softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrec
from fastrec.errors import BackendError, FallbackWarning
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def agrees(function: Any, x: torch.Tensor) -> None:
    model = Lambda(function).eval()
    engine = fastrec.compile(model, [x], backend="native", fallback="error")
    for batch in (1, 2, 5):
        other = x[:1].repeat(batch, *[1] * (x.dim() - 1)) * 0.7
        with torch.inference_mode():
            torch.testing.assert_close(engine(other), model(other), rtol=2e-5, atol=2e-5)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def sdpa(mask: Any = None, **options: Any) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        attn_mask = mask(x) if callable(mask) else mask
        return F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=attn_mask, **options)

    return run


def lower_triangle(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()


ATTENTION = {
    "causal": sdpa(is_causal=True),
    "scaled": sdpa(is_causal=True, scale=0.3),
    "bool": sdpa(lambda x: x[:, :, :, :1] > -0.1),
    "triangle": sdpa(lower_triangle),
    "nothing seen": sdpa(lambda x: x[:, :, :, :1] > 99),
    "added per query": sdpa(lambda x: x[:, :, :, :1]),
    "added, one head": sdpa(lambda x: x[:, :1, :1, :1]),
    "more queries": lambda x: F.scaled_dot_product_attention(x, x[:, :, :1], x[:, :, :1]),
    "causal, fewer keys": lambda x: F.scaled_dot_product_attention(
        x, x[:, :, :1], x[:, :, :1], is_causal=True
    ),
}


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, length: int) -> None:
    agrees(ATTENTION[name], draw(2, 3, length, 8))


def test_expand_as() -> None:
    agrees(lambda x: x * x[:, :1].expand_as(x), draw(2, 5, 8))


def test_transformer_encoder_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    agrees(lambda x: encoder(x, src_key_padding_mask=x[:, :, 0] > 1.5), draw(3, 7, 16))


def test_multihead_attention_with_a_causal_mask() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    agrees(lambda x: attention(x, x, x, attn_mask=mask, need_weights=False)[0], draw(3, 7, 16))


REDUCTIONS = {
    "mean": lambda x: x.mean(1),
    "mean kept": lambda x: x - x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum of two": lambda x: x.sum((1, 2)),
    "sum apart": lambda x: x.sum((1, 3)),
    "amax": lambda x: x.amax(2),
    "softmax": lambda x: x.softmax(-1),
    "softmax inside": lambda x: x.softmax(1),
    "zeros_like": lambda x: torch.zeros_like(x).masked_fill_(x > 0, 2.0) + x,
}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 17), (2, 64, 65)])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, sizes: tuple[int, ...]) -> None:
    agrees(REDUCTIONS[name], draw(2, *sizes))


def test_a_tensor_in_use_is_changed_in_place() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y.view(x.shape[0], -1) + y.masked_fill_(y > 0, 1.0)

    agrees(twice, draw(2, 3))


def test_what_is_lacking_is_named_with_what_is_near_and_can_run_in_torch() -> None:
    model = Lambda(lambda x: torch.cumprod(x, 1))
    with pytest.raises(BackendError, match=r"aten\.cumprod\.default.*nearest supported"):
        fastrec.compile(model, [draw(2, 3)], backend="native", fallback="error")
    with pytest.warns(FallbackWarning, match="cumprod"):
        engine = fastrec.compile(model, [draw(2, 3)], backend="native")
    assert any("cumprod" in str(row["why"]) for row in engine.describe())
    with pytest.raises(ValueError, match="fallback"):
        fastrec.compile(model, [draw(2, 3)], backend="native", fallback="none")


def test_examples_that_are_views_leave_the_sizes_free() -> None:
    config = RankerConfig(
        n_items=30, n_categories=9, history_length=12, d=16, category_dim=8, ffn=16, tower=(16,)
    )
    ids, length = torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 2])
    inputs = (ids, ids, ids, length, ids[:, :3], ids[:, :3])
    engine = fastrec.compile(Ranker(config).eval(), inputs, "native", fallback="error")
    assert [f.dims for f in engine.spec.fields][::4] == [("B", "L"), ("B", "m")]

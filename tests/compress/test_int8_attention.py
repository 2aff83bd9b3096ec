"""Int8(attention=True): scores in integers, Value with the dynamic range of each call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastrec
from fastrec import AttentionPattern, Int8
from fastrec.errors import ArgumentError, DtypeError
from fastrec.kernels import window_sparse_attention_int8
from fastrec.nn import SparseInt8Linear, WindowSparseAttention, WindowSparseInt8Attention


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(60, 32)
        self.attention = WindowSparseAttention(32, 4, pattern=AttentionPattern(window=3))
        self.score = nn.Linear(32, 16)

    def forward(self, ids: Tensor, length: Tensor) -> Tensor:
        return self.score(self.attention(self.items(ids), lengths=length)[0])


def inputs(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, 60, (batch, 17), generator=generator)
    return ids, torch.randint(0, 18, (batch,), generator=generator)


def quantised(**options: object) -> tuple[nn.Module, fastrec.compress.QuantizeReport]:
    model = Model().eval()
    report = fastrec.quantize_(model, Int8(attention=True), [inputs(), inputs(9)], **options)
    return model, report


@torch.no_grad()
def test_it_computes_what_the_op_computes() -> None:
    model, report = quantised()
    assert report.attention == ["attention"]
    attention = model.attention
    assert isinstance(attention, WindowSparseInt8Attention)
    assert isinstance(attention.in_proj, SparseInt8Linear)
    x, length = model.items(inputs()[0]), inputs()[1]
    q, k, v = (
        part.unflatten(-1, (4, 8)).transpose(1, 2) for part in attention.in_proj(x).chunk(3, -1)
    )
    q_scale, k_scale = float(attention.q_scale), float(attention.k_scale)
    q8 = (q / q_scale).round().add(128).clamp(0, 255).to(torch.uint8)
    k8 = (k / k_scale).round().clamp(-128, 127).to(torch.int8)
    expected = window_sparse_attention_int8(
        q8, k8, v, attention.pattern, q_scale=q_scale, k_scale=k_scale, lengths=length
    )
    merged = attention.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, lengths=length)[0], merged)


@torch.no_grad()
def test_scores_stay_close_whatever_the_size_of_v() -> None:
    """v of one sequence a thousand times another's: each has its own range."""
    model, plain = quantised()[0], Model().eval()
    for m in (model, plain):
        table = m.items if isinstance(m.items, nn.Embedding) else None
        assert table is not None  # fewer than 1000 rows stay float
    ids, length = inputs(8)
    expected, found = plain(ids, length), model(ids, length)
    valid = torch.arange(17) < length[:, None]
    error = (found - expected)[valid].square().mean().sqrt()
    assert error < 0.05 * expected[valid].square().mean().sqrt()


def test_training_masks_and_weights_are_the_float_modules() -> None:
    model, plain = quantised()[0].attention, Model().eval().attention
    x = torch.randn(2, 9, 32)
    plain.in_proj, plain.out_proj = model.in_proj, model.out_proj
    for options in ({"need_weights": True}, {"attn_mask": torch.zeros(9, 9)}):
        torch.testing.assert_close(model(x, **options)[0], plain(x, **options)[0])
    own, v = WindowSparseInt8Attention(32, 4), torch.randn(2, 9, 32, requires_grad=True)
    own(v)[0].sum().backward()
    assert v.grad is not None


@torch.no_grad()
def test_save_load_and_compile(tmp_path: Path) -> None:
    model, _ = quantised()
    fastrec.save(model, tmp_path / "model")
    again = fastrec.load(tmp_path / "model", Model())
    assert torch.equal(again(*inputs()), model(*inputs()))
    engine = fastrec.compile(model, inputs(), backend="native", threads=1)
    torch.testing.assert_close(engine(*inputs()), model(*inputs()), rtol=1e-3, atol=1e-3)
    compiled = torch.export.export(model, inputs()).module()
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()))


def test_only_where_it_is_asked_for() -> None:
    model = Model().eval()
    assert fastrec.quantize_(model, Int8(), [inputs()]).attention == []
    assert type(model.attention) is WindowSparseAttention
    model, report = quantised(filter_fn="score")
    assert report.attention == []
    model, report = quantised(filter_fn=["attention"])
    assert report.attention == ["attention"]
    assert type(model.score) is nn.Linear
    with pytest.raises(DtypeError, match="attention"):
        WindowSparseInt8Attention.from_attention(nn.Linear(2, 2), 1.0, 1.0)
    with pytest.raises(ArgumentError, match="k_scale"):
        WindowSparseInt8Attention.from_attention(WindowSparseAttention(8, 2), 1.0, float("nan"))

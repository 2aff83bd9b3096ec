"""student: smaller models of one's own and of fastrec.models that start from their teacher."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import fastrec
from fastrec import AttentionPattern, student
from fastrec.compress.hidden_states import hidden_distance
from fastrec.errors import ArgumentError
from fastrec.models import EncoderConfig, Ranker, RankerConfig, SASRec, SASRecConfig

CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=8, d=64, ffn=128, tower=(96, 96, 96), n_blocks=4
)


def inputs(batch: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def ids(high: int, size: int) -> Tensor:
        return torch.randint(1, high, (batch, size), generator=generator)

    length = torch.randint(1, 9, (batch,), generator=generator)
    return [ids(300, 8), ids(20, 8), ids(5, 8), length, ids(300, 9), ids(20, 9)]


def ranker(config: RankerConfig = CONFIG) -> Ranker:
    """Item vectors on 12 directions, so that a width of 32 can hold them."""
    torch.manual_seed(0)
    model = Ranker(config).eval()
    with torch.no_grad():
        model.item_embedding.weight.copy_(torch.randn(300, 12) @ torch.randn(12, config.d) / 6)
        model.item_embedding.weight[0] = 0
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.uniform_(-0.1, 0.1)
    return model


def alike(a: Tensor, b: Tensor) -> float:
    """Mean correlation of the rows."""
    rows = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
    return float(torch.stack(rows).mean())


@torch.no_grad()
@pytest.mark.parametrize("pattern", [None, AttentionPattern(window=2)])
def test_a_student_of_the_same_size_computes_the_same(pattern: AttentionPattern | None) -> None:
    teacher = ranker(dataclasses.replace(CONFIG, encoder=EncoderConfig(pattern=pattern)))
    same = student(teacher)
    assert same is not teacher
    torch.testing.assert_close(same(*inputs()), teacher(*inputs()), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_narrow_ranker_resembles_its_teacher() -> None:
    teacher = ranker()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    small = student(teacher, depth=0.5, width=0.5)
    assert small.config.d == 32
    assert small.config.n_blocks == 2
    assert small.config.tower == (48, 48)
    assert not small.training
    fresh = Ranker(small.config).eval()
    scores, encoded = teacher(*inputs()), teacher.encode(*inputs()[:4])
    length = inputs()[3]
    far, near = (hidden_distance(m.encode(*inputs()[:4]), encoded, length) for m in (fresh, small))
    assert near < 0.1 < far
    assert alike(student(teacher, width=0.5)(*inputs()), scores) > 0.2
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert student(teacher, depth=1, width=16).config.d == 16


def test_a_student_is_distilled_on_from_there() -> None:
    teacher = ranker()
    terms = [fastrec.compress.LogitKL(), fastrec.HiddenStates()]
    small = student(teacher, depth=0.5, width=0.5)
    losses = fastrec.distill(small, teacher, [inputs()], terms).losses
    assert losses["HiddenStates"] < 0.2


@torch.no_grad()
def test_a_narrow_sasrec_resembles_its_teacher() -> None:
    torch.manual_seed(0)
    teacher = SASRec(SASRecConfig(n_items=300, max_length=8, d=64, ffn=128)).eval()
    teacher.item_embedding.weight.copy_(torch.randn(300, 12) @ torch.randn(12, 64))
    items, length = inputs()[0], inputs()[3]
    exact = student(teacher)
    torch.testing.assert_close(exact(items, length), teacher(items, length), rtol=1e-3, atol=1e-3)
    small = student(teacher, width=0.5)
    expected = teacher.logits(teacher.last_state(items, length))
    assert alike(small.logits(small.last_state(items, length)), expected) > 0.8


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)
        self.tower = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(self.encoder(self.items(ids)).mean(1)).squeeze(-1)


@torch.no_grad()
def test_a_model_of_ones_own() -> None:
    torch.manual_seed(0)
    teacher, ids = Mine().eval(), torch.randint(0, 50, (4, 6))
    small = student(teacher, depth=0.4, width=0.5)
    assert len(small.encoder.layers) == 2
    # The 3rd and the 5th of five.
    for own, index in zip(small.encoder.layers, (2, 4), strict=True):
        guide = teacher.encoder.layers[index]
        assert torch.equal(own.self_attn.in_proj_weight, guide.self_attn.in_proj_weight)
        assert own.linear1.out_features == own.linear2.in_features == 16
    assert small.tower[0].out_features == small.tower[3].in_features == 12
    assert small(ids).shape == (4,)
    assert len(teacher.encoder.layers) == 5
    assert len(student(teacher, depth=3).encoder.layers) == 3


@torch.no_grad()
def test_neurons_that_do_nothing_go_first() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 3)).eval()
    teacher[2].weight[:, ::2] = 0
    x = torch.randn(5, 8)
    small = student(teacher, width=0.5)
    assert small[0].out_features == 10
    torch.testing.assert_close(small(x), teacher(x))


def test_what_cannot_shrink_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    for options, name in (
        ({"width": 0.5}, "width"),
        ({"depth": 0.5}, "depth"),
        ({"width": 0.0}, "width"),
        ({"width": 1.5}, "width"),
        ({"width": 8}, "width"),
        ({"width": "half"}, "width"),
    ):
        with pytest.raises((ArgumentError, ValueError), match=name if name != "half" else None):
            student(model, **options)  # type: ignore[arg-type]
    for options, name in (
        ({"width": 30}, "width"),
        ({"width": True}, "width"),
        ({"depth": 9}, "depth"),
        ({"depth": 0}, "depth"),
        ({"depth": float("nan")}, "depth"),
    ):
        with pytest.raises(ArgumentError, match=name):
            student(ranker(), **options)  # type: ignore[arg-type]

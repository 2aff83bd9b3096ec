"""Events appended to an encoded causal history: what encoding the whole of it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrec
from fastrec.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    IdRangeError,
    ShapeError,
)
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.models.encoder import EncoderConfig

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

ITEMS, LONGEST = 90, 41
# Sums of a row taken in another order: at most some 64 terms a sum, two layers deep, of states of
# order 4. A wrong key or position is off by more than 0.1.
TOLERANCE = 1e-4


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, ITEMS, shape, generator=torch.Generator().manual_seed(seed))


def sasrec(encoder: EncoderConfig | None = None, int8: bool = False) -> Any:
    torch.manual_seed(3)
    of = SASRecConfig(ITEMS, LONGEST, d=32, encoder=encoder or EncoderConfig())
    model = SASRec(of).eval()
    inputs = (ids(2, 30), torch.tensor([30, 17]))
    if int8:
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    return fastrec.compile(model, inputs, backend="native", threads=2, fallback="error")


def sparse(**kwargs: Any) -> EncoderConfig:
    return EncoderConfig(pattern=fastrec.AttentionPattern(causal=True, **kwargs))


ENGINES = {
    "plain": lambda: sasrec(),
    "int8": lambda: sasrec(int8=True),
    "window": lambda: sasrec(sparse(window=2, offsets="none")),
    "log2": lambda: sasrec(sparse(window=1, offsets="log2")),
    "far alone": lambda: sasrec(sparse(window=0, offsets=(3, 7))),
}


@pytest.fixture(scope="module", params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Any:
    return ENGINES[request.param]()


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_appending_is_encoding_the_whole(
    engine: Any, data: st.DataObject, lengths: list[int], steps: list[int]
) -> None:
    events = ids(len(lengths), LONGEST, seed=data.draw(st.integers(0, 99))).numpy()
    padding = data.draw(st.integers(0, 3))
    begun = events[:, : max(lengths) + padding]
    state = engine.encode(begun, np.array(lengths), candidates=(), appendable=True)
    first = state.output.copy()
    reached = list(lengths)
    latest = state
    for step in steps:
        new = np.stack([events[u, n : n + step] for u, n in enumerate(reached)])
        latest = engine.append(latest, new)
        reached = [n + step for n in reached]
    assert latest.lengths == tuple(reached)
    assert latest.sizes["L"] == max(reached)
    whole = engine(events, np.full(len(lengths), LONGEST))
    for user, length in enumerate(reached):
        error = np.abs(latest.output[user, :length] - whole[user, :length]).max()
        # One integer of an activation may round to the other side: a step of its scale.
        assert error <= (TOLERANCE if engine.precision != "int8" else 0.15)
    assert (state.output == first).all()
    assert not latest.output.flags.writeable


def test_the_old_state_grows_in_two_directions() -> None:
    engine = sasrec()
    events = ids(1, 12).numpy()
    state = engine.encode(events[:, :10], np.array([10]), candidates=(), appendable=True)
    one = engine.append(state, events[:, 10:11])
    other = engine.append(state, events[:, 11:12])
    assert one.lengths == other.lengths == (11,)
    assert not np.array_equal(one.output[0, 10], other.output[0, 10])
    assert np.array_equal(one.output[0, :10], other.output[0, :10])
    assert one.nbytes > one.output.nbytes


EVENTS = {"item": ("B", "L"), "weight": ("B", "L")}


class CausalRanker(nn.Module):
    """Not ours: a causal block over events with a weight each, candidates attend to it."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 16)
        self.position = nn.Embedding(64, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.keys = nn.Linear(16, 32)

    def forward(self, item: Tensor, weight: Tensor, cand: Tensor) -> Tensor:
        batch, length = item.shape
        x = self.item(item) * weight[..., None]
        x = x + self.position(torch.arange(length))
        q, k, v = (
            t.reshape(batch, length, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, 16))
        key, value = self.keys(x).chunk(2, dim=-1)
        c = self.item(cand)
        seen = F.scaled_dot_product_attention(c[:, None], key[:, None], value[:, None])
        return (seen[:, 0] * c).sum(-1)


def test_candidates_of_a_model_of_the_users_own_are_scored_on_grown_states() -> None:
    torch.manual_seed(0)
    model = CausalRanker().eval()
    item, weight, cand = ids(2, 9), torch.rand(2, 9), ids(2, 5, seed=4)
    engine = fastrec.compile(
        model, (item, weight, cand), "native", fallback="error", dims=EVENTS | {"cand": ("B", "m")}
    )
    state = engine.encode(item[:, :6], weight[:, :6], appendable=True)
    state = engine.append(state, item[:, 6:], weight[:, 6:])
    assert state.lengths == (9, 9)
    scores = engine.score(state, cand)
    assert np.abs(scores.numpy() - model(item, weight, cand).detach().numpy()).max() < TOLERANCE
    with pytest.raises(BackendError, match="has no output"):
        _ = state.output
    bad = weight[:, 6:].clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="weight"):
        engine.append(state, item[:, 6:], bad)


def test_a_history_whose_events_see_each_other_cannot_grow() -> None:
    model = Ranker(RankerConfig(n_items=50, n_categories=5, history_length=9, d=16, tower=(8,)))
    inputs = tuple(
        torch.ones(shape, dtype=torch.int64) for shape in ((1, 9),) * 3 + ((1,), (1, 4), (1, 4))
    )
    engine = fastrec.compile(model.eval(), inputs, backend="native", fallback="error")
    with pytest.raises(BackendError, match=r"blocks\.0.*not causal"):
        engine.encode(*inputs[:4], appendable=True)
    assert engine.encode(*inputs[:4]).lengths is None


class Bad(nn.Module):
    """Causal attention aside, what new rows alone do not give."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.item = nn.Embedding(ITEMS, 8)
        self.table = nn.Parameter(torch.randn(64, 8))

    def forward(self, item: Tensor) -> Tensor:
        x = self.item(item)
        if self.how == "mean":
            return x + x.mean(1, keepdim=True)
        return x + self.table[: item.shape[1]]


@pytest.mark.parametrize(("how", "why"), [("mean", "mixes events"), ("table", "by position")])
def test_what_does_not_follow_from_new_rows_is_refused(how: str, why: str) -> None:
    engine = fastrec.compile(
        Bad(how).eval(),
        (ids(2, 7),),
        "native",
        fallback="error",
        dims={"item": ("B", "L")},
        limits={"L": 64},
    )
    with pytest.raises(BackendError, match=why):
        engine.encode(ids(2, 7), candidates=(), appendable=True)


def test_a_length_that_is_fixed_cannot_grow() -> None:
    engine = fastrec.compile(Bad("table").eval(), (ids(2, 7),), "native", fallback="error")
    with pytest.raises(BackendError, match="one free size"):
        engine.encode(ids(2, 7), candidates=(), appendable=True)


def test_bad_input_is_named_and_leaves_the_engine_usable() -> None:
    engine = sasrec()
    events = ids(2, 12).numpy()
    lengths = np.array([10, 12])
    state = engine.encode(events, lengths, candidates=(), appendable=True)
    with pytest.raises(ShapeError, match="2 users"):
        engine.append(state, events[:1, :1])
    with pytest.raises(ShapeError, match=rf"at most {LONGEST} events.*encode the newest"):
        engine.append(state, ids(2, LONGEST - 11).numpy())
    with pytest.raises(IdRangeError, match="item"):
        engine.append(state, np.full((2, 1), ITEMS))
    with pytest.raises(ArgumentError):
        engine.append(state, events[:, :1], lengths)
    with pytest.raises(ShapeError):
        engine.append(state, events[:, :0])
    with pytest.raises(DtypeError, match="state"):
        engine.append(events, events[:, :1])
    with pytest.raises(ArgumentError, match="another engine's"):
        sasrec().append(state, events[:, :1])
    plain = engine.encode(events, lengths, candidates=())
    with pytest.raises(ArgumentError, match="appendable=True"):
        engine.append(plain, events[:, :1])
    with pytest.raises(BackendError, match="no candidates"):
        engine.score(plain, events)
    grown = engine.append(state, events[:, :1])
    assert grown.lengths == (11, 13)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.append(grown, events[:, :1])

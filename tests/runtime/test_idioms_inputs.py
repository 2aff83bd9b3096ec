"""Inputs and outputs as people write them: dicts, lists, dataclasses, None, several results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from idioms import agrees, close, draw, ids
from torch import Tensor, nn

import fastrec
from fastrec.errors import ArgumentError, DtypeError, FallbackWarning, ShapeError
from fastrec.exporters.flat import described
from fastrec.kernels._compiled import reason_missing
from fastrec.structure import Structure, build

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


@dataclasses.dataclass
class Batch:
    item: Tensor
    features: list[Tensor]
    weight: Tensor | None = None


class Scorer(nn.Module):
    """Takes a batch, a dict, a number and keywords; gives a dict with a tuple inside."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(40, 8)
        self.out = nn.Linear(8, 2)

    def forward(
        self, batch: Batch, more: dict[str, Tensor], scale: float, *, bias: Any = None
    ) -> dict[str, Any]:
        x = self.items(batch.item).sum(1) * scale + self.items(more["extra"])
        for feature in batch.features:
            x = x + feature
        if bias is not None:
            x = x + bias
        y = self.out(x)
        return {"scores": y, "inside": (y.sigmoid(), y.argmax(-1)), "best": y.max() > 99, "n": None}


def request(batch: int) -> tuple[Any, ...]:
    item, extra = ids(40, batch, 5, seed=batch), ids(40, batch, seed=batch)
    features = [draw(batch, 8, seed=batch), draw(batch, 1, seed=batch)]
    return Batch(item, features), {"extra": extra}, 0.5


def test_structures_in_and_out() -> None:
    engine = agrees(Scorer(), request)
    batch, more, scale = request(2)
    with pytest.raises(ArgumentError, match=r"0\.5, which the engine was compiled with"):
        engine(batch, more, 0.25)
    with pytest.raises(ArgumentError, match="extra"):
        engine(batch, {"other": more["extra"]}, scale)
    with pytest.raises(ArgumentError, match="2 values"):
        engine(Batch(batch.item, batch.features[:1]), more, scale)
    with pytest.raises(DtypeError, match="item"):
        engine(Batch(batch.item.int(), batch.features), more, scale)


def test_named_arguments_and_arrays() -> None:
    class Named(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> tuple[Tensor, Tensor]:
            return a + b, (a * 10).long()

    model, a, b = Named(), draw(3, 4), draw(3, 1)
    engine = fastrec.compile(model, {"a": a, "b": b}, backend="native", fallback="error")
    sums, whole = engine(b=b[:2].numpy(), a=a[:2].numpy())
    assert isinstance(sums, np.ndarray)
    np.testing.assert_allclose(sums, (a + b)[:2])
    np.testing.assert_array_equal(whole, (a * 10).long()[:2])
    assert whole.dtype == np.int64


def test_integers_of_any_size_come_back_whole() -> None:
    values = torch.tensor([[0, 1, -1], [2**62, -(2**63), 2**63 - 1], [2**24 + 1, -(2**40), 7]])
    agrees({"same": lambda x: x + 0, "floats": lambda x: (x > 0).float()}, lambda n: (values[:n],))


def test_doubles_go_in_and_come_out() -> None:
    agrees({"double": lambda x: x * 2 + 1}, lambda n: (draw(n, 3, seed=n).double(),))


def test_rows_of_all_users_one_after_the_other() -> None:
    """A flat dict of features beside a mask that has the batch first."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(40, 8)

        def forward(self, item: Tensor, mask: Tensor) -> Tensor:
            x = self.items(item).view(mask.shape[0], -1, 8)
            return (x * mask.unsqueeze(-1)).sum(1)

    engine = agrees(
        Flat(), lambda n: (ids(40, n * 6, seed=n), draw(n, 6, seed=n)), batches=(4, 1, 3)
    )
    with pytest.raises(ShapeError):
        engine(ids(40, 13), draw(2, 6))


def test_a_saved_engine_keeps_the_structure(tmp_path: Path) -> None:
    engine = fastrec.compile(
        Scorer().eval(), request(3), backend="native", threads=1, fallback="error"
    )
    loaded = fastrec.runtime.load_engine(engine.save(tmp_path / "scorer"))
    ours, wanted = loaded(*request(2)), engine(*request(2))
    assert list(ours) == list(wanted)
    assert torch.equal(ours["scores"], wanted["scores"])
    assert torch.equal(ours["inside"][1], wanted["inside"][1])


def test_a_fallback_is_told() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.nonzero(x > 0).sum()

    with pytest.warns(FallbackWarning, match="nonzero"):
        engine = fastrec.compile(Sizes(), (draw(3, 4),), backend="native", threads=1)
    assert any("nonzero" in str(row.get("why")) for row in engine.describe())


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just("tensor")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)


def with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: with_tensors(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(inner) for inner in value)
    return torch.zeros(1) if value == "tensor" else value


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a is b if isinstance(a, Tensor) else a == b


@settings(max_examples=50, deadline=None)
@given(values)
def test_any_structure_is_taken_apart_and_built_again(value: Any) -> None:
    value = with_tensors(value)
    tensors: list[Tensor] = []
    node = described(value, tensors, [], "")
    assert equal(build(node, list(tensors)), with_same(value, iter(tensors)))
    structure = Structure([node, node], [], node, [], packed=False)
    assert Structure.from_dict(structure.to_dict()).arguments == [node, node]


def with_same(value: Any, tensors: Any) -> Any:
    """The value with the described (detached) tensors in place of its own."""
    if isinstance(value, dict):
        return {key: with_same(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_same(inner, tensors) for inner in value)
    return next(tensors) if isinstance(value, Tensor) else value


def fixed_because(engine) -> str:
    return "; ".join(r["why"] for r in engine.describe() if r.get("setting") == "free sizes")


def test_a_model_that_refuses_other_batches_is_told_so() -> None:
    class Four(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if len(x) != 4:
                raise KeyError(f"{len(x)} users")
            return {"sum": x.sum(1), "double": x * 2}

    engine = fastrec.compile(Four(), (draw(4, 3),), backend="native", fallback="error")
    assert "a batch of 5 in place of 4: '5 users'" in fixed_because(engine)
    with pytest.raises(ShapeError):
        engine(draw(5, 3))
    with pytest.raises(ArgumentError, match="dims"):
        fastrec.compile(Four(), (draw(4, 3),), backend="native", dims={"x": ("B", 3)})


def test_an_input_that_nothing_reads_leaves_the_batch_free() -> None:
    class Splits(nn.Module):
        def forward(self, user: Tensor, x: Tensor) -> Tensor:
            heads = torch.cat(x.split(2, dim=1), 0)
            return torch.cat(heads.split(x.shape[0], dim=0), 1) * 3

    model = Splits()
    engine = fastrec.compile(model, (ids(9, 3), draw(3, 4)), backend="native", fallback="error")
    assert not fixed_because(engine)
    for batch in (1, 4, 9):
        x = draw(batch, 4)
        close(f"B={batch}", engine(ids(9, batch), x), model(ids(9, batch), x))


def test_a_batch_that_stands_second() -> None:
    """As offsets of bags do."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(30, 4, mode="sum")

        def forward(self, dense: Tensor, offsets: Tensor, item: Tensor) -> Tensor:
            return dense + self.bag(item[0], offsets[0]) + self.bag(item[1], offsets[1])

    def request(batch: int) -> tuple[Tensor, ...]:
        offsets = torch.arange(0, 2 * batch, 2).repeat(2, 1)
        return draw(batch, 4), offsets, ids(30, 2, 2 * batch)

    model = Bags()
    free = {"offsets": (2, "B"), "item": (2, "n")}
    engine = fastrec.compile(model, request(4), backend="native", fallback="error", dims=free)
    for batch in (4, 1, 6):
        with torch.no_grad():
            close(f"B={batch}", engine(*request(batch)), model(*request(batch)))

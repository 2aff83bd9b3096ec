"""Bad input and properties of ``int8_embedding`` and ``padded_attention``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.errors import ArgumentError, DtypeError, IdRangeError, ShapeError
from fastrec.kernels import int8_embedding, padded_attention, registry

TABLE, SCALE = torch.ones(5, 8, dtype=torch.int8), torch.ones(5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_an_id_outside_the_table_is_named(backend: str, bad: int) -> None:
    with pytest.raises(IdRangeError, match=rf"ids: expected ids in \[0, 5\), got {bad}"):
        int8_embedding(torch.tensor([[0, 4], [bad, 1]]), TABLE, SCALE, backend=backend)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.tensor([0], dtype=torch.int32), TABLE, SCALE), DtypeError, "ids: expected int64"),
        ((torch.tensor([0]), TABLE.float(), SCALE), DtypeError, "table: expected int8"),
        ((torch.tensor([0]), TABLE[0], SCALE), ShapeError, "table"),
        ((torch.tensor([0]), TABLE, SCALE.double()), DtypeError, "scale"),
        ((torch.tensor([0]), TABLE, SCALE[:4]), ShapeError, r"scale: expected shape \[5\]"),
    ],
)
def test_bad_tables_are_refused(args: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        int8_embedding(*args)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(1, 70),
    dims=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_attention_of_any_shape(
    batch: int, heads: int, queries: int, keys: int, dims: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dims, generator=generator) * 3
    k, v = torch.randn(2, batch, heads, keys, dims, generator=generator).unbind(0)
    lengths = data.draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
    kwargs = {"lengths": torch.tensor(lengths)}
    out = padded_attention(q, k, v, **kwargs)
    registry()["padded_attention"].compare(out, (q, k, v), kwargs)


def test_extreme_scores_stay_finite() -> None:
    q = torch.full((1, 1, 1, 4), 1e4)
    k = torch.tensor([1e4, -1e4, 0.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4).contiguous()
    v = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert torch.equal(padded_attention(q, k, v)[0, 0, 0], v[0, 0, 0])


Q = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((Q.double(), Q, Q), {}, DtypeError, "q: expected torch.float32|q: expected float32"),
        ((Q[0], Q, Q), {}, ShapeError, "q: "),
        ((Q, Q[:1], Q), {}, ShapeError, "k: expected shape"),
        ((Q, Q, Q[..., :4]), {}, ShapeError, "v: expected shape"),
        ((Q[..., :0],) * 3, {}, ShapeError, "q: "),
        ((Q, Q, Q), {"lengths": torch.tensor([1, 5])}, ArgumentError, r"lengths: .*\[0, 4\]"),
        ((Q, Q, Q), {"lengths": torch.tensor([-1, 2])}, ArgumentError, "lengths"),
        ((Q, Q, Q), {"lengths": torch.tensor([1])}, ShapeError, "lengths"),
        ((Q, Q, Q), {"lengths": torch.tensor([1.0, 2.0])}, DtypeError, "lengths"),
        ((Q, Q, Q), {"scale": float("nan")}, ArgumentError, "scale"),
    ],
)
def test_bad_attention_input(
    args: Any, kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        padded_attention(*args, **kwargs)


def test_the_torch_ops_pass_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.fastrec.int8_embedding.default, (torch.tensor([1, 2]), TABLE, SCALE)
    )
    q = torch.randn(2, 3, 4, 8)
    lengths = {"lengths": torch.tensor([2, 4])}
    torch.library.opcheck(torch.ops.fastrec.padded_attention.default, (q, q, q), lengths)


def test_they_compile_to_one_graph() -> None:
    def both(ids: torch.Tensor, q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = torch.ops.fastrec.int8_embedding(ids, TABLE, SCALE)
        return torch.ops.fastrec.padded_attention(q, q, q, lengths=lengths) + rows[0]

    args = (torch.tensor([1, 2]), torch.randn(2, 3, 4, 8), torch.tensor([2, 4]))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), both(*args))

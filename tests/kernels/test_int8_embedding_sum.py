"""``int8_embedding_sum``: bad input, gradients, the torch op, and every instruction set alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import ArgumentError, DtypeError, IdRangeError, ShapeError
from fastrec.kernels import int8_embedding_sum
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.int8_embedding_sum.samples import compare, sample

ISAS = kernels.available_isas() if reason_missing() is None else []
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
INT8, SCALE = torch.arange(40, dtype=torch.int8).reshape(5, 8), torch.ones(5)
FLOAT = torch.linspace(-1, 1, 40).reshape(5, 8)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    kinds=st.text("ifb", min_size=2, max_size=8),
    dims=st.integers(1, 140),
    position=st.booleans(),
    padding=st.booleans(),
    quantised=st.booleans(),
    data=st.data(),
)
def test_every_instruction_set_gives_the_reference_bits(
    shape: list[int],
    kinds: str,
    dims: int,
    position: bool,
    padding: bool,
    quantised: bool,
    data: st.DataObject,
) -> None:
    counts = data.draw(st.lists(st.integers(6, 20), min_size=len(kinds), max_size=len(kinds)))
    flags = {"position": position, "padding": padding, "quantised": quantised}
    args, kwargs = sample(tuple(shape), kinds, dims, counts, **flags).make()
    for isa in ISAS:
        with kernels.force_isa(isa):
            compare(int8_embedding_sum(*args, **kwargs), args, kwargs)


def test_strided_tables_and_ids() -> None:
    args = ([IDS.T, None], [FLOAT.T.contiguous().T, INT8], [None, SCALE])
    compare(int8_embedding_sum(*args), args, {})


def test_padding_and_periods_mean_what_they_say() -> None:
    out = int8_embedding_sum(
        [IDS, None], [INT8, FLOAT], [SCALE, None], periods=[None, 2], padding_ids=[0, None]
    )
    assert torch.equal(out[0, 0], FLOAT[0])
    assert torch.equal(out[0, 1], INT8[1].float() + FLOAT[1])
    assert torch.equal(out[1, 2], FLOAT[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_a_bad_id_is_named(backend: str, bad: int) -> None:
    ids = IDS.clone()
    ids[1, 1] = bad
    with pytest.raises(
        IdRangeError, match=rf"ids\[1\]: expected ids in \[0, 5\), got {bad} at position 4"
    ):
        int8_embedding_sum([IDS, ids], [INT8, FLOAT], [SCALE, None], backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_is_never_quantised(backend: str) -> None:
    table = FLOAT.clone()
    table[4, 7] = torch.nan
    args = ([IDS], [table], [None])
    with pytest.raises(ArgumentError, match="tables: expected numbers, got a NaN"):
        int8_embedding_sum(*args, out_scale=0.1, backend=backend)
    assert int(int8_embedding_sum(*args, backend=backend).isnan().sum()) == 1
    # The row with the NaN is padding: nothing of it is used.
    int8_embedding_sum(*args, padding_ids=[4], out_scale=0.1, backend=backend)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (([], [], []), {}, ArgumentError, "tables: expected 1 to 8 tables, got 0"),
        (([IDS] * 9, [FLOAT] * 9, [None] * 9), {}, ArgumentError, "tables"),
        (([IDS], [FLOAT] * 2, [None] * 2), {}, ArgumentError, "ids: expected 2 entries"),
        (([None], [FLOAT], [None]), {}, ArgumentError, "ids: expected at least one tensor"),
        (([IDS.int()], [FLOAT], [None]), {}, DtypeError, r"ids\[0\]: expected int64"),
        (([IDS, IDS[0]], [FLOAT] * 2, [None] * 2), {}, ShapeError, r"ids\[1\]"),
        (([IDS], [FLOAT.half()], [None]), {}, DtypeError, r"tables\[0\]"),
        (([IDS] * 2, [FLOAT, FLOAT[:, :4]], [None] * 2), {}, ShapeError, r"tables\[1\]"),
        (([IDS], [FLOAT[0]], [None]), {}, ShapeError, r"tables\[0\]"),
        (([IDS], [INT8], [None]), {}, ArgumentError, r"scales\[0\]"),
        (([IDS], [FLOAT], [SCALE]), {}, ArgumentError, r"scales\[0\]"),
        (([IDS], [INT8], [SCALE[:2]]), {}, ShapeError, r"scales\[0\]: expected shape \[5\]"),
        (([IDS], [INT8], [SCALE.double()]), {}, DtypeError, r"scales\[0\]"),
        (([IDS], [FLOAT], [None]), {"padding_ids": [5]}, ArgumentError, r"padding_ids\[0\]"),
        (([IDS], [FLOAT], [None]), {"out_scale": 0.0}, ArgumentError, "out_scale"),
    ],
)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        int8_embedding_sum(*args, **kwargs)


@pytest.mark.parametrize("period", [0, 6])
def test_a_bad_period(period: int) -> None:
    args = ([IDS, None], [FLOAT, FLOAT], [None, None])
    with pytest.raises(ArgumentError, match=r"periods\[1\]: expected 1..5"):
        int8_embedding_sum(*args, periods=[None, period])


def test_gradients_of_float_tables() -> None:
    table, position = FLOAT.clone().requires_grad_(), FLOAT.flip(0).clone().requires_grad_()
    out = int8_embedding_sum([IDS, IDS, None], [INT8, table, position], [SCALE, None, None])
    out.sum().backward()
    assert table.grad is not None
    assert position.grad is not None
    assert torch.equal(table.grad[:, 0], torch.bincount(IDS.reshape(-1), minlength=5).float())
    assert torch.equal(position.grad[:, 0], torch.tensor([2.0, 2, 2, 0, 0]))
    with torch.no_grad():
        again = int8_embedding_sum([IDS, IDS, None], [INT8, table, position], [SCALE, None, None])
    assert torch.equal(again, out)


def test_compiles_and_passes_opcheck() -> None:
    op = torch.ops.fastrec.int8_embedding_sum.default
    lists = ([IDS, None], [INT8, FLOAT], [SCALE, None])
    torch.library.opcheck(op, (*lists, [0, 3], [-1, -1]))
    torch.library.opcheck(op, (*lists, [0, 3], [2, -1], 0.1, 7))
    compiled = torch.compile(int8_embedding_sum, fullgraph=True, backend="aot_eager")
    kwargs = {"out_scale": 0.1, "out_zero_point": 9, "padding_ids": [1, None]}
    assert torch.equal(compiled(*lists, **kwargs), int8_embedding_sum(*lists, **kwargs))

"""The straight way into a plan lets pass just the arrays that InputSpec.check accepts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrec
from fastrec.errors import BackendError, FastrecError
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.native.engine import PlanEngine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

CONFIG = RankerConfig(
    n_items=30, n_categories=9, history_length=12, d=16, category_dim=8, ffn=16, tower=(16,)
)


@pytest.fixture(scope="module")
def engine() -> Iterator[PlanEngine]:
    ranker = Ranker(CONFIG).eval()
    item, length = torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 2])
    example = (item, item, item, length, item[:, :3], item[:, :3])
    with fastrec.compile(ranker, example, "native", 2, settings={"executor": "plan"}) as made:
        assert isinstance(made, PlanEngine)
        yield made


@given(data=st.data(), sizes=st.fixed_dictionaries({n: st.integers(1, 13) for n in "BLm"}))
@settings(max_examples=150, deadline=None)
def test_it_agrees_with_the_check(
    engine: PlanEngine, data: st.DataObject, sizes: dict[str, int]
) -> None:
    inputs = [a.copy() for a in engine.spec.sample({**sizes, "L": min(sizes["L"], 12)})]
    for _ in range(data.draw(st.integers(0, 2))):
        i = data.draw(st.integers(0, 5))
        at = data.draw(st.integers(0, inputs[i].size - 1))
        match data.draw(st.sampled_from(["value", "longer", "rank", "dtype"])):
            case "value":
                value = data.draw(st.integers(-2, 31) | st.sampled_from([-(2**63), 2**63 - 1]))
                if inputs[i].dtype == np.int64:
                    inputs[i].reshape(-1)[at] = value
            case "longer":
                inputs[i] = np.repeat(inputs[i], 2, axis=inputs[i].ndim - 1)
            case "rank":
                inputs[i] = inputs[i][..., None]
            case "dtype":
                inputs[i] = inputs[i].astype(data.draw(st.sampled_from(["i4", "f4", "u8", ">i8"])))
    try:
        engine.spec.check(inputs)
    except FastrecError as error:
        assert engine._native(tuple(inputs), 1) is None
        with pytest.raises(type(error)):
            engine(*inputs)
    else:
        scores = engine._native(tuple(inputs), 1)
        assert scores is not None
        np.testing.assert_array_equal(scores, engine(*inputs))


def test_what_is_not_in_order_is_converted(engine: PlanEngine) -> None:
    request = engine.spec.sample({"B": 3, "L": 6, "m": 4})
    expected = engine(*request)
    turned = [np.asfortranarray(a) for a in request]
    longs = [a.astype(np.longlong) for a in request]
    for other in (turned, longs, list(map(torch.from_numpy, request))):
        assert engine._native(tuple(other), 1) is None
        np.testing.assert_array_equal(np.asarray(engine(*other)), expected)
    assert engine._native((*request, request[0]), 1) is None
    assert engine._native((None, *request[1:]), 1) is None


def test_a_closed_engine_refuses_calls() -> None:
    model = torch.nn.Linear(4, 2).eval()
    x = torch.randn(3, 4)
    engine = fastrec.compile(model, (x,), "native", 1, settings={"executor": "plan"})
    np.testing.assert_allclose(engine(x.numpy()), model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(x.numpy())

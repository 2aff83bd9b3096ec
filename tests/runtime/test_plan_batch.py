"""Users of a batch that no step mixes are run apart: the same bits, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrec
from fastrec.errors import ArgumentError, IdRangeError
from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import GroupedLinear
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower, program_spec
from fastrec.runtime.native.passes import optimise
from fastrec.spec import InputField, InputSpec

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=33, d=32, category_dim=8, ffn=48, tower=(40, 24)
)
ROWS = InputSpec((InputField("x", ("B", 6), "float32"),), {"B": (1, 64)})


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def engine_of(model: nn.Module, spec: InputSpec, *inputs: Tensor, threads: int = 2) -> PlanEngine:
    plan = lower(model.eval(), inputs, spec)
    optimise(plan)
    about = {"backend": "native", "precision": "fp32", "rows": [], "versions": {}}
    return PlanEngine.build(plan, spec=program_spec(spec, plan, inputs), threads=threads, **about)


def ranker(int8: bool) -> PlanEngine:
    torch.manual_seed(1)
    model = Ranker(CONFIG).eval()
    spec = spec_of(model, ())
    inputs = tuple(map(torch.from_numpy, spec.sample({"B": 4, "L": 33, "m": 11})))
    if int8:
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    return engine_of(model, spec, *inputs)


@pytest.fixture(scope="module", params=[False, True], ids=["float", "int8"])
def engine(request: pytest.FixtureRequest) -> PlanEngine:
    return ranker(request.param)


@given(batch=st.integers(1, 40), length=st.integers(1, 33), m=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_user_gets_the_same_bits_in_any_batch(
    engine: PlanEngine, batch: int, length: int, m: int
) -> None:
    request = engine.spec.sample({"B": batch, "L": length, "m": m}, seed=batch)
    together = engine(*request)
    alone = [engine(*(a[b : b + 1] for a in request)) for b in range(batch)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_the_batch_of_a_ranker(engine: PlanEngine) -> None:
    plan = engine.plan()
    assert plan["users"] == "B"
    assert sorted(plan["rows_of_layers"]) == [[1, "L"], [1, "m"]]


def test_the_first_user_at_fault_is_named(engine: PlanEngine) -> None:
    request = engine.spec.sample({"B": 9, "L": 30, "m": 33})
    request[0][7, 2], request[0][5, 3] = 401, 400
    arrays = [np.ascontiguousarray(a) for a in request]
    with pytest.raises(IdRangeError, match=r"got 40[01]"):
        engine(*arrays)


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_a_profile_tells_of_every_step(engine: PlanEngine, batch: int) -> None:
    request = engine.spec.sample({"B": batch, "L": 33, "m": 33})
    assert all(row["us"] > 0 for row in engine.profile(request))


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x + x[0],
        lambda x: x + torch.arange(x.shape[0])[:, None],
        lambda x: F.softmax(x.t().contiguous(), -1).t().contiguous(),
    ],
    ids=["mean", "first", "position", "softmax"],
)
def test_users_that_a_model_mixes_stay_together(mixing: Callable[[Tensor], Tensor]) -> None:
    model, x = Lambda(mixing), torch.randn(5, 6)
    engine = engine_of(model, ROWS, x)
    assert engine.plan()["users"] is None
    for batch in (1, 2, 40):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-6)


def test_layers_of_one_row_a_user_get_many_users() -> None:
    model = nn.Sequential(nn.Linear(6, 96), nn.ReLU(), nn.Linear(96, 3)).eval()
    engine = engine_of(model, ROWS, torch.randn(5, 6))
    assert engine.plan()["users"] == "B"
    assert engine.plan()["rows_of_layers"] == [[1]]
    for batch in (1, 31, 32, 33, 63, 64):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_nan_of_one_user_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 32))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[(torch.randn(4, 6),)])
    engine = engine_of(model, ROWS, torch.randn(5, 6))
    x = torch.randn(64, 6)
    x[50, 1] = float("nan")
    with pytest.raises(ArgumentError, match="NaN"):
        engine(x)


def test_rows_of_a_group_are_shared_out(engine: PlanEngine) -> None:
    assert {symbol for _, _, symbol in engine.plan()["groups"]} == {"L", "m"}
    for length, m in ((33, 40), (32, 1), (1, 33), (31, 32)):
        request = engine.spec.sample({"B": 1, "L": length, "m": m}, seed=length)
        together = engine(*request)
        alone = engine._checked(request, threads=1)
        np.testing.assert_array_equal(together, alone)


def test_a_chain_of_grouped_linears_is_one_row_group() -> None:
    torch.manual_seed(0)

    def chain(linear: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(*(linear() for _ in range(4)))

    spec = InputSpec((InputField("x", ("B", "L", 32), "float32"),), {"B": (1, 64), "L": (1, 64)})
    x = torch.randn(2, 40, 32)
    grouped = engine_of(chain(lambda: GroupedLinear(32, 32, 4, shuffle=True)), spec, x)
    dense = engine_of(chain(lambda: nn.Linear(32, 32)), spec, x)
    for engine in (grouped, dense):
        assert engine.plan()["groups"] == [[0, 4, "L"]]
    together = grouped(x.numpy())
    alone = grouped._checked([x.numpy()], threads=1)
    np.testing.assert_array_equal(together, alone)


def views_of(step: dict[str, Any]) -> list[list[Any]]:
    """The views of a step's operands, as the plan describes them."""
    return [
        view
        for operand in step["operands"].values()
        for view in (operand if not operand or isinstance(operand[0], list) else [operand])
    ]


def test_buffers_of_a_group_share_no_memory(engine: PlanEngine) -> None:
    plan = engine.plan()
    slot_of = {buffer: slot for slot, buffers in enumerate(plan["slots"]) for buffer in buffers}
    for begin, end, _ in plan["groups"]:
        views = [v for s in plan["steps"][begin:end] for v in views_of(s)]
        slots = [slot_of[b] for b in {view[0] for view in views} if b in slot_of]
        assert len(slots) == len(set(slots)) > 0


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: F.relu(F.relu(x) * 2 + F.relu(x)[:, :1]),
        lambda x: F.layer_norm(x * torch.arange(x.shape[1])[:, None], [6]) * 2,
        lambda x: (F.relu(x) @ F.relu(x).transpose(1, 2)).sum(-1, keepdim=True) * F.relu(x),
        lambda x: F.softmax(F.relu(x).sum(-1), -1),
    ],
    ids=["first", "position", "product", "softmax"],
)
def test_a_step_that_reads_other_rows_is_in_no_group_with_them(
    reading: Callable[[Tensor], Tensor],
) -> None:
    spec = InputSpec((InputField("x", ("B", "L", 6), "float32"),), {"B": (1, 8), "L": (1, 99)})
    model = nn.Sequential(nn.Linear(6, 6), Lambda(reading))
    engine = engine_of(model, spec, torch.randn(2, 50, 6))
    for batch, length in ((1, 99), (2, 64), (1, 3)):
        x = torch.randn(batch, length, 6)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)

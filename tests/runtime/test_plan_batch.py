"""Users of a batch that no step mixes are run apart: the same bits, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastrec.runtime.native.batch import batch_symbol, rows_of_layers
from fastrec.runtime.native.memory import assign_slots
from fastrec.runtime.native.rows import row_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrec
from fastrec import kernels
from fastrec.errors import ArgumentError, IdRangeError
from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import GroupedLinear
from fastrec.runtime.native.buffers import ITEMSIZE, Extent
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
    assert batch_symbol(engine._program) == "B"
    assert set(rows_of_layers(engine._program, "B")) == {Extent(1, ("L",)), Extent(1, ("m",))}


def test_the_first_user_at_fault_is_named(engine: PlanEngine) -> None:
    request = engine.spec.sample({"B": 9, "L": 30, "m": 33})
    request[0][7, 2], request[0][5, 3] = 401, 400
    arrays = [np.ascontiguousarray(a) for a in request]
    with pytest.raises(IdRangeError, match="got 400"):
        engine._call(arrays)  # past the check of ids, which would say it first


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
    assert batch_symbol(engine._program) is None
    for batch in (1, 2, 40):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-6)


def test_layers_of_one_row_a_user_get_many_users() -> None:
    model = nn.Sequential(nn.Linear(6, 96), nn.ReLU(), nn.Linear(96, 3)).eval()
    engine = engine_of(model, ROWS, torch.randn(5, 6))
    assert batch_symbol(engine._program) == "B"
    assert rows_of_layers(engine._program, "B") == [Extent(1)]
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
    groups = row_groups(engine._program, "B")
    assert {g.symbol for g in groups} == {"L", "m"}
    for length, m in ((33, 40), (32, 1), (1, 33), (31, 32)):
        request = engine.spec.sample({"B": 1, "L": length, "m": m}, seed=length)
        together = engine(*request)
        with kernels.call_threads(1):
            alone = engine._call([np.ascontiguousarray(a) for a in request])
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
        (group,) = row_groups(engine._program, "B")
        assert (group.begin, group.end) == (0, 4)
    together = grouped(x.numpy())
    with kernels.call_threads(1):
        alone = grouped._call([x.numpy()])
    np.testing.assert_array_equal(together, alone)


def test_buffers_of_a_group_share_no_memory(engine: PlanEngine) -> None:
    plan = engine._program
    groups = row_groups(plan, "B")
    assign_slots(plan, ITEMSIZE, groups)
    for group in groups:
        steps = plan.steps[group.begin : group.end]
        buffers = {v.buffer for s in steps for v in (*s.inputs, *s.outputs)}
        slots = [b.index for b in buffers if b.space == "arena"]
        assert len(slots) == len(set(slots))


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

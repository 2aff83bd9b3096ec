"""The native plan: views, elementwise programs, lowering of models, memory, faults."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastrec
from fastrec import kernels
from fastrec.errors import BackendError
from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Buffer, Extent
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.native.program import Program
from fastrec.spec import InputField, InputSpec

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def engine_of(model: nn.Module, *inputs: torch.Tensor, threads: int = 2) -> PlanEngine:
    spec = spec_of(model, inputs)
    plan = lower(model.eval(), inputs, spec)
    optimise(plan)
    return PlanEngine.build(
        plan, backend="native", precision="fp32", threads=threads, spec=spec, rows=[], versions={}
    )


def agrees(model: nn.Module, *inputs: torch.Tensor, rtol: float = 2e-5) -> PlanEngine:
    """The engine of a model whose answers are torch's."""
    engine = engine_of(model, *inputs)
    with torch.inference_mode():
        expected = model(*inputs).float()
    torch.testing.assert_close(engine(*inputs), expected, rtol=rtol, atol=rtol)
    return engine


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


# Sizes and views.


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    cut=st.lists(st.integers(1, 6), min_size=1, max_size=5),
)
def test_views_agree_with_numpy(sizes: list[int], order: Any, cut: list[int]) -> None:
    data = np.arange(np.prod(sizes)).reshape(sizes)
    axes = list(range(len(sizes)))
    order.shuffle(axes)
    shape = tuple(Extent(s) for s in sizes)
    view = Buffer("int64", shape, "constant", data=data).view().permuted(axes)
    moved = data.transpose(axes)
    np.testing.assert_array_equal(view.constant, moved)
    selected = view.selected(0, sizes[axes[0]] - 1)
    assert selected is not None
    np.testing.assert_array_equal(selected.constant, moved[-1])
    # A reshape is a view of the same numbers, or honestly none.
    if np.prod(cut) == data.size:
        reshaped = view.reshaped(tuple(Extent(c) for c in cut))
        if reshaped is not None:
            np.testing.assert_array_equal(reshaped.constant, moved.reshape(cut))
        elif len(sizes) == 1:
            raise AssertionError("a vector can always be reshaped")


def test_extents_multiply_and_keep_their_symbols() -> None:
    size = Extent.of("B") * Extent(3) * Extent.of("L") * Extent.of("B")
    assert size == Extent(3, ("B", "B", "L"))
    assert size.at({"B": 2, "L": 5}) == 60
    assert size.number is None
    assert (size * Extent(0)).number == 0
    assert str(size) == "3*B*B*L"


# Elementwise programs.

UNARY = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "log": lambda x: torch.log(x.abs() + 1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.5),
    "clamp": lambda x: x.clamp_min(-0.5).clamp_max(0.25),
    "compare": lambda x: torch.where((x > 0.1) | ~(x < -0.3), x * 2, -x),
    "fill": lambda x: x.masked_fill(x <= 0, 7.0),
    "integers": lambda x: ((x > 0).long() * 3 - 1).float() / 4,
    "reverse": lambda x: 1 - x,
    "alpha": lambda x: torch.add(x, x, alpha=2.5),
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_elementwise_ops(name: str, size: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 3
    agrees(Lambda(UNARY[name]), x)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kept=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_broadcasting(shape: list[int], kept: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [2, *shape]
    other = [s if k else 1 for s, k in zip(shape[1:], kept, strict=False)]
    a = torch.randn(shape, generator=generator)
    b = torch.randn(other, generator=generator)
    agrees(Lambda(lambda x: torch.maximum(x * b, x - b) + x), a)


def test_a_chain_is_one_step_and_unused_work_goes() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        torch.exp(x)
        return torch.tanh(x * 2 + 1) * torch.sigmoid(x)

    engine = agrees(Lambda(chain), torch.randn(4, 33))
    assert [step["kind"] for step in engine.plan()["steps"]] == ["map"]


def test_a_nan_that_the_model_makes_goes_through_as_in_torch() -> None:
    x = torch.tensor([[-1.0, 1.0, 0.0]])
    model = Lambda(lambda x: torch.relu(torch.log(x)) + torch.maximum(torch.log(x), x * 0))
    assert torch.equal(engine_of(model, x.abs() + 1)(x).isnan(), model(x).isnan())
    assert model(x).isnan().any()


# Models.


class Bst(nn.Module):
    """A small behaviour-sequence ranker in plain torch, with none of fastrec's modules."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.items = nn.Embedding(50, d)
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Sequential(
            nn.Linear(2 * d, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 17), nn.GELU()
        )
        self.out = nn.Linear(17, 1, bias=False)

    def forward(self, history: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        x = self.items(history)

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(y.shape[0], y.shape[1], 3, 8).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), scale=0.3
        )
        x = self.norm(x + mixed.transpose(1, 2).reshape(x.shape))
        first, last = x[:, 0], x.select(1, -1)
        pooled = torch.cat([first * last, self.items(candidate)], dim=-1)
        return self.out(self.head(pooled)).squeeze(-1)


@pytest.mark.parametrize("batch", [1, 2, 37])
def test_a_model_in_plain_torch(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    history = torch.randint(0, 50, (batch, 9), generator=generator)
    candidate = torch.randint(0, 50, (batch,), generator=generator)
    model = Bst()
    engine = agrees(model, history, candidate)
    # Another batch size, without compiling again.
    with torch.inference_mode():
        expected = model(history[:1].repeat(5, 1), candidate[:1].repeat(5))
    torch.testing.assert_close(
        engine(history[:1].repeat(5, 1), candidate[:1].repeat(5)), expected, rtol=2e-5, atol=2e-5
    )


CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=33, d=32, category_dim=8, ffn=48, tower=(40, 24)
)


def request(batch: int, length: int, candidates: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(0, high, shape, generator=g)  # noqa: E731
    return (
        draw(300, batch, length),
        draw(20, batch, length),
        draw(5, batch, length),
        draw(length + 1, batch),
        draw(300, batch, candidates),
        draw(20, batch, candidates),
    )


@pytest.fixture(scope="module", params=["float", "int8"])
def ranker(request: pytest.FixtureRequest) -> tuple[Ranker, PlanEngine]:
    torch.manual_seed(1)
    model = Ranker(CONFIG).eval()
    inputs = globals()["request"](4, 33, 11)
    if request.param == "int8":
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    return model, engine_of(model, *inputs)


@pytest.mark.parametrize("sizes", [(1, 33, 50), (1, 1, 1), (2, 17, 3), (9, 33, 1), (64, 5, 7)])
def test_every_size_of_the_ranker(
    ranker: tuple[Ranker, PlanEngine], sizes: tuple[int, int, int]
) -> None:
    model, engine = ranker
    inputs = request(*sizes, seed=sum(sizes))
    with torch.inference_mode():
        expected = model(*inputs)
    # A float's last bit may turn the rounding of an int8 layer's input.
    int8 = any(step["kind"] == "linear_int8" for step in engine.plan()["steps"])
    limit = 0.02 * float(expected.abs().max()) if int8 else 2e-5
    assert float((engine(*inputs) - expected).abs().max()) <= limit


def test_symbols_are_free(ranker: tuple[Ranker, PlanEngine]) -> None:
    assert ranker[1].plan()["symbols"] == ["B", "L", "m"]


def test_empty_histories_are_torchs(ranker: tuple[Ranker, PlanEngine]) -> None:
    model, engine = ranker
    inputs = list(request(3, 8, 5))
    inputs[3] = torch.tensor([0, 8, 0])
    with torch.inference_mode():
        expected = model(*inputs)
    # As above: a rounding of an int8 layer's input may turn.
    int8 = any(step["kind"] == "linear_int8" for step in engine.plan()["steps"])
    limit = 1e-2 if int8 else 2e-5
    torch.testing.assert_close(engine(*inputs), expected, rtol=limit, atol=limit)


def test_callers_do_not_disturb_each_other(ranker: tuple[Ranker, PlanEngine]) -> None:
    _, engine = ranker
    requests = [request(b, length, 4, seed=b) for b, length in ((1, 9), (3, 33), (8, 20), (2, 2))]
    alone = [engine(*r) for r in requests]
    wrong: list[int] = []

    def call(i: int) -> None:
        wrong.extend(i for _ in range(30) if not torch.equal(engine(*requests[i]), alone[i]))

    threads = [threading.Thread(target=call, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_give_the_same_bits(ranker: tuple[Ranker, PlanEngine]) -> None:
    model, engine = ranker
    inputs = request(16, 33, 50)
    assert torch.equal(engine_of(model, *inputs, threads=1)(*inputs), engine(*inputs))


def test_profile_has_a_row_a_step(ranker: tuple[Ranker, PlanEngine]) -> None:
    _, engine = ranker
    rows = engine.profile([t.numpy() for t in request(1, 33, 50)])
    assert len(rows) == len(engine.plan()["steps"])
    assert all(row["us"] > 0 for row in rows)
    linear = next(r for r in rows if r["module"] == "tower.0")
    assert linear["macs"] == 50 * 96 * 40


# Memory.


def test_buffers_that_live_together_never_share(ranker: tuple[Ranker, PlanEngine]) -> None:
    plan = ranker[1].plan()
    spans: dict[int, tuple[int, int]] = {}
    within = {p: (b, e - 1) for b, e, _ in plan["groups"] for p in range(b, e)}
    for position, step in enumerate(plan["steps"]):
        begin, end = within.get(position, (position, position))
        for operand in step["operands"].values():
            for view in operand if not operand or isinstance(operand[0], list) else [operand]:
                spans[view[0]] = (spans.get(view[0], (begin, end))[0], end)
    assert 2 * sum(map(len, plan["slots"])) > 3 * len(plan["slots"])
    for buffers in plan["slots"]:
        for i, a in enumerate(buffers):
            for b in buffers[:i]:
                assert spans[a][1] < spans[b][0] or spans[b][1] < spans[a][0]


# What is refused, and faults.


def test_an_unknown_op_is_named_with_its_module() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumprod(x, 1)

    model = nn.Sequential(nn.Linear(4, 4), Inner())
    with pytest.raises(
        BackendError, match=r"native: aten\.cumprod\.default in 1 \(test_plan\.py:\d+\): "
    ):
        engine_of(model, torch.randn(2, 4))


def test_an_id_computed_out_of_range_is_an_error_and_the_engine_lives() -> None:
    table = nn.Embedding(5, 8)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids + 2)

    engine = engine_of(Shifted(), torch.tensor([0, 1]))
    with pytest.raises(IndexError, match=r"ids: .* of which table gets ids in 0\.\.4, got 6"):
        engine(torch.tensor([0, 4]))
    assert torch.equal(engine(torch.tensor([0, 1])), table.weight[2:4].detach())


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("outputs", [1, 3, 4, 5])
def test_layers_of_few_outputs(isa: str, rows: int, outputs: int) -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(70, outputs, bias=bias), nn.ReLU())
        with kernels.force_isa(isa):
            agrees(model, torch.randn(rows, 70))


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("rows", [1, 13, 50])
def test_int8_layers_hand_on_tiles_and_torchs_integers(isa: str, rows: int) -> None:
    torch.manual_seed(0)
    widths = [24, 70, 33, 40]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(40, 16)).eval()
    x = torch.randn(rows, 24)
    fastrec.quantize_(model, fastrec.Int8(), calibration=[(x,)])
    with kernels.force_isa(isa):
        engine = engine_of(model, x)
        planned = engine.plan()["steps"]
        layers_int8 = [s["fields"] for s in planned if s["kind"] == "linear_int8"]
        assert [fields["x_tiles"] for fields in layers_int8] == [False, True, True, True]
        assert [fields["y_tiles"] for fields in layers_int8] == [True, True, True, False]
        with torch.inference_mode():
            assert torch.equal(engine(x), model(x))


@pytest.mark.parametrize("rows", [1, 12, 50])
def test_a_norm_hands_on_the_tiles_of_its_layers(rows: int) -> None:
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(70), nn.Linear(70, 33)
    model = nn.Sequential(norm, layer).eval()
    x = torch.randn(rows, 70)
    fastrec.quantize_(model, fastrec.Int8(), calibration=[(x,)])
    spec = spec_of(model, (x,))
    plan = lower(model, (x,), spec)
    optimise(plan)
    assert [(s.kind, s.y_tiles) for s in plan.steps] == [
        ("layer_norm", True),
        ("linear_int8", False),
    ]
    # Through the step that writes rows, and the layer that packs them, come the same integers.
    apart = nn.Sequential(norm, Lambda(lambda y: y.relu() - (-y).relu()), model[1]).eval()
    torch.testing.assert_close(engine_of(model, x)(x), engine_of(apart, x)(x), rtol=0, atol=0)


def test_a_nan_made_before_an_int8_layer_is_an_error() -> None:
    model = nn.Sequential(Lambda(torch.log), nn.Linear(32, 32))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[(torch.rand(4, 32) + 1,)])
    engine = engine_of(model, torch.rand(2, 32) + 1)
    with pytest.raises(ValueError, match="1: expected an input of numbers, got a NaN"):
        engine(torch.full((2, 32), -1.0))


def test_the_engine_refuses_what_it_cannot_run() -> None:
    x = Buffer("float32", (Extent.of("B"),), "input")
    y = Buffer("float32", (Extent.of("B"),)).view()
    spec = InputSpec((InputField("x", ("B",), "float32"),))
    about = {"backend": "native", "precision": "fp32", "threads": 1, "rows": [], "versions": {}}
    with pytest.raises(AttributeError, match="no kind of step 'warp'"):
        steps.warp(x=x.view(), y=y)
    for program, why in (
        ([("add_f32", 0, 7)], "reads"),
        ([("cube_f32", 0)], "unknown instruction"),
    ):
        step = steps.map(x=[x.view()], y=y, program=program)
        with pytest.raises(BackendError, match=why):
            PlanEngine.build(Program(("B",), [x], [step], [y]), spec=spec, **about)

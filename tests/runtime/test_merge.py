"""Linear layers of one input become one: same bits, fewer steps, where readers allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastrec
from fastrec import kernels
from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime.native import passes
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.native.program import Program

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


class Attention(nn.Module):
    """Query, key and value as three layers, as people write them."""

    def __init__(self, d: int = 64, heads: int = 2, bias: Any = (True, True, True)) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(d, d, bias=b) for b in bias)
        self.out = nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, length, d = x.shape
        q, k, v = (
            layer(x).view(b, length, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, length, d))


def plan_of(model: nn.Module, *inputs: torch.Tensor) -> Program:
    plan = lower(model.eval(), inputs, spec_of(model, inputs))
    optimise(plan)
    return plan


def engine_of(model: nn.Module, plan: Program, *inputs: torch.Tensor) -> PlanEngine:
    spec = spec_of(model, inputs)
    return PlanEngine(
        plan, backend="native", precision="fp32", threads=2, spec=spec, rows=[], versions={}
    )


def both(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, *inputs: torch.Tensor
) -> tuple[Program, Program]:
    """The plan, and what it is without the pass; their answers are the same bits."""
    merged = plan_of(model, *inputs)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "merge_linears", lambda plan: None)
        apart = plan_of(model, *inputs)
    one, other = (engine_of(model, plan, *inputs) for plan in (merged, apart))
    for batch in (1, 2, 5):
        some = [torch.cat([x] * 5)[:batch] for x in inputs]
        torch.testing.assert_close(one(*some), other(*some), rtol=0, atol=0)
    return merged, apart


def kinds(plan: Program) -> list[str]:
    return [step.kind for step in plan.steps]


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("quantised", [False, True])
def test_three_projections_are_one_product(
    isa: str, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 21, 64)
    if quantised:
        fastrec.quantize_(model, fastrec.Int8(), calibration=[(x,)])
    kind = "linear_int8" if quantised else "linear"
    with kernels.force_isa(isa):
        merged, apart = both(model, monkeypatch, x)
    assert kinds(apart).count(kind) == 4
    assert kinds(merged) == [kind, "attention", kind]
    assert merged.steps[0].y.shape[-1].number == 192
    assert merged.steps[0].module == "q, k, v"


def test_pruned_panels_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model, x = Attention(96, 3).eval(), torch.randn(2, 9, 96)
    with torch.no_grad():
        model.k.weight.zero_()  # a layer without a single group
    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.5, rounds=1))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[(x,)])
    merged, _ = both(model, monkeypatch, x)
    assert kinds(merged).count("linear_int8") == 2


def test_layers_that_differ_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 9, 64)
    merged, _ = both(Attention(bias=(True, False, True)).eval(), monkeypatch, x)
    assert kinds(merged).count("linear") == 3  # the one without bias is on its own

    class TwoInputs(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.q(x)[:, None], self.k(x * 2)[:, None]
            return F.scaled_dot_product_attention(q, k, k)[:, 0]

    merged, _ = both(TwoInputs().eval(), monkeypatch, x)
    assert kinds(merged).count("linear") == 2


def test_a_gated_unit_is_one_product_and_one_map(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x) * F.relu(self.gate(x)))

    torch.manual_seed(3)
    merged, _ = both(Gated().eval(), monkeypatch, torch.randn(3, 32))
    assert kinds(merged) == ["linear", "map", "linear"]


def test_a_result_and_a_layers_input_need_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x)) + self.b(x)

    torch.manual_seed(4)
    merged, _ = both(Chain().eval(), monkeypatch, torch.randn(3, 32))
    assert kinds(merged).count("linear") == 3


@given(
    widths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    inputs=st.integers(1, 40),
    rows=st.integers(1, 30),
)
@settings(max_examples=15, deadline=None)
def test_any_widths(widths: list[int], inputs: int, rows: int) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(inputs, n) for n in widths)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.exp(layer(x) * 0.1) for layer in self.layers], 1)

    torch.manual_seed(5)
    model, x = Sums().eval(), torch.randn(rows, inputs)
    plan = plan_of(model, x)
    with torch.inference_mode():
        expected = model(x)
    # exp's argument differs by the rounding of a sum of up to 41 products, and exp by its own.
    torch.testing.assert_close(engine_of(model, plan, x)(x), expected, rtol=2e-5, atol=2e-5)
    assert kinds(plan).count("linear") <= 1 + sum(n <= 4 for n in widths)

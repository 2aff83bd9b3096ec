"""The choices each layer has, the sweep over them and the fits to what they cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrec import AttentionPattern, Budget
from fastrec.errors import ArgumentError, DtypeError
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import GroupedLinear, LowRankLinear, SparseInt8Linear, WindowSparseAttention
from fastrec.search import Choice, Space, fit_costs
from fastrec.search.costs import (
    CostTable,
    Measured,
    Setting,
    Variant,
    _behind,
    carried_out,
    variants_of,
)
from fastrec.search.fit import non_negative
from fastrec.search.front import pick, sweep
from fastrec.search.space import Unit, restructured

CONFIG = RankerConfig(n_items=1200, n_categories=20, history_length=8, d=32, ffn=64, tower=(128,))


def test_every_layer_of_a_ranker_has_choices_or_a_reason() -> None:
    units, left = Space().units(Ranker(CONFIG))
    kinds = {unit.name: unit.kind for unit in units}
    assert kinds["item_embedding"] == "table"
    assert kinds["blocks.0.attention"] == "attention"
    assert kinds["tower.0"] == "linear"
    assert left["tower.2"] == "fewer than 16 outputs"
    assert "fewer than 1000 rows" in left["category_embedding"]
    for unit in units:
        assert unit.choices[0] == Choice()
        names = [choice.name for choice in unit.choices]
        assert len(set(names)) == len(names)
    layers = {n for n, m in Ranker(CONFIG).named_modules() if isinstance(m, nn.Linear)}
    assert layers <= kinds.keys() | left.keys()


def test_torchs_attention_is_one_layer_with_its_projections() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    units, left = Space(windows=(2,), offsets=("none",)).units(model)
    (unit,) = units
    assert unit.name == "0.self_attn"
    assert [c.name for c in unit.choices[1:]] == ["fp32, window 2 + none", "int8, window 2 + none"]
    assert set(left) == {"0.linear1", "0.linear2"}
    x = torch.randn(3, 6, 32)
    setting = Setting((x.numpy(),), 1, [(x,)])
    made = carried_out(model.eval(), {"0.self_attn": unit.choices[2]}, setting)
    assert isinstance(made[0].self_attn, WindowSparseAttention)
    assert isinstance(made[0].self_attn.in_proj, SparseInt8Linear)
    assert made(x).shape == x.shape


def test_choices_are_carried_out_on_a_copy() -> None:
    model = Ranker(CONFIG)
    chosen = {
        "blocks.0.attention": Choice(pattern=AttentionPattern(window=2)),
        "blocks.0.ffn.0": Choice(rank=0.25),
        "blocks.0.ffn.2": Choice(groups=4),
    }
    made = restructured(model, chosen)
    assert isinstance(made.blocks[0].attention, WindowSparseAttention)
    assert isinstance(made.blocks[0].ffn[0], LowRankLinear)
    assert made.blocks[0].ffn[0].rank == 8
    assert isinstance(made.blocks[0].ffn[2], GroupedLinear)
    assert type(model.blocks[0].ffn[0]) is nn.Linear
    with pytest.raises(ArgumentError, match="chosen"):
        restructured(model, {"nowhere": Choice()})
    with pytest.raises(DtypeError, match="Choice"):
        restructured(model, {"tower.0": "int8"})


def test_variants_show_every_choice() -> None:
    units, _ = Space().units(Ranker(CONFIG))
    seen = {(u, c) for variant in variants_of(units) for u, c in variant.items()}
    assert seen == {(u.name, c) for u in units for c in u.choices}
    assert variants_of(units)[0] == {u.name: Choice() for u in units}


def test_an_activation_is_a_cost_of_the_layer_before_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.ReLU())
    assert _behind(nn.ModuleDict({"ffn": model}), ["ffn.0"]) == {"ffn.1": "ffn.0"}
    assert _behind(model, ["0"]) == {"1": "0"}
    assert _behind(model, []) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"precisions": ("fp16",)},
        {"sparsities": (1.0,)},
        {"ranks": (0.0,)},
        {"groups": (1,)},
        {"windows": (-1,)},
    ],
)
def test_spaces_that_make_no_sense_are_refused(options: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Space(**options)  # type: ignore[arg-type]


CHOICES = (Choice(), Choice(rank=0.5), Choice(rank=0.25))
UNITS = tuple(Unit(f"layer{i}", "linear", CHOICES) for i in range(3))
_numbers = st.lists(st.floats(0.01, 100), min_size=9, max_size=9)


def table(us: list[float]) -> CostTable:
    cost = np.array(us).reshape(3, 3)
    variants = [
        Variant({u.name: c.name for u in UNITS}, {u.name: cost[i, j] for i, u in enumerate(UNITS)},
                {u.name: 1 for u in UNITS})
        for j, c in enumerate(CHOICES)
    ]  # fmt: skip
    return CostTable(UNITS, variants, Measured(float(cost[:, 0].sum()) / 1e3 + 0.01, 1.0))


@settings(deadline=None, max_examples=50)
@given(us=_numbers, lost=_numbers)
def test_no_choice_of_choices_beats_the_sweeps_front(us: list[float], lost: list[float]) -> None:
    costs = table(us)
    layers = ((u.name, c.name) for u in UNITS for c in CHOICES)
    losses = dict(zip(layers, lost, strict=True))
    budget = Budget(latency_ms=1.0)
    front = sweep(UNITS, costs, losses, budget)
    assert front
    shown = [(c.cost.latency_ms, c.loss) for c in front]
    assert shown == sorted(shown)
    assert [loss for _, loss in shown] == sorted((loss for _, loss in shown), reverse=True)
    for choices in itertools.product(CHOICES, repeat=3):
        chosen = {u.name: c for u, c in zip(UNITS, choices, strict=True)}
        latency = costs.predict(chosen).latency_ms
        loss = sum(losses[n, c.name] for n, c in chosen.items())
        for known, own in shown:
            assert not (latency < known * (1 - 1e-9) - 1e-12 and loss < own * (1 - 1e-9) - 1e-12)


@settings(deadline=None, max_examples=50)
@given(us=_numbers, count=st.integers(1, 6), limit=st.floats(1e-3, 1.0))
def test_trials_are_distinct_and_start_at_the_budget(
    us: list[float], count: int, limit: float
) -> None:
    losses = {(u.name, c.name): float(j) for u in UNITS for j, c in enumerate(CHOICES)}
    budget = Budget(latency_ms=limit)
    front = sweep(UNITS, table(us), losses, budget)
    picked = pick(front, budget, count)
    assert 1 <= len(picked) <= count
    assert len({c.key for c in picked}) == len(picked)
    within = [c for c in front if budget.use(c.cost) <= 1]
    if within:
        assert picked[0] == within[-1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_non_negative_least_squares_finds_what_is_there(truth: list[float]) -> None:
    rng = np.random.default_rng(0)
    design = np.abs(rng.standard_normal((40, 3)))
    found = non_negative(design, design @ np.array(truth))
    assert (found >= 0).all()
    np.testing.assert_allclose(found, truth, atol=1e-6)
    assert (non_negative(design, -np.ones(40)) == 0).all()


def steps(alpha: dict[str, float]) -> list[Variant]:
    """Layers of 1 to 40 10^5 multiply-adds on kernels of given microseconds per 10^6, + 2 us."""
    rows = [
        {"op": op, "macs": 100_000 * n, "density": 1.0, "bytes": 4 * n, "us": rate * n / 10 + 2}
        for op, rate in alpha.items()
        for n in range(1, 41)
    ]
    return [Variant({}, {}, {}, rows, None)]


def test_the_papers_form_fits_one_kernel_and_not_two() -> None:
    one = fit_costs(steps({"linear": 10.0}))
    assert one is not None
    assert one.layers["paper"].coefficients == pytest.approx({"alpha": 10.0, "beta": 2.0}, rel=1e-3)
    assert one.layers["paper"].r2 == pytest.approx(1)
    assert max(map(abs, one.layers["paper"].residuals_us)) < 1e-6
    assert "fits: " in one.verdict
    two = fit_costs(steps({"linear": 40.0, "sparse_int8_linear": 4.0}))
    assert two is not None
    assert two.layers["paper"].relative_error > 0.2
    assert two.layers["precise"].relative_error < 0.02
    assert "fits badly" in two.verdict
    assert fit_costs([Variant({}, {}, {}, [], None)]) is None

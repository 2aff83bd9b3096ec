"""prune_: layers by name, thresholds by layer, N:M, schedules, regrowth, and failures."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrec.compress import BlockPruning, Int8, NMPruning, prune_, quantize_
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import GroupedLinear, SeparableProjection


def tower(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 32))
    with torch.no_grad():
        model[2].weight.mul_(0.2)  # a layer that one threshold for all would take first
    return model


def zeros(layer: nn.Module) -> float:
    return float((layer.weight == 0).float().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert set(now) == set(before)
    assert all(torch.equal(now[k], before[k]) for k in before)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("0", {"0"}),
        (["0", "3"], {"0", "3"}),
        (re.compile("[23]"), {"2", "3"}),
        (("0", re.compile("3")), {"0", "3"}),
    ],
)
def test_names_and_expressions_choose_layers(chosen: object, expected: set[str]) -> None:
    report = prune_(tower(), BlockPruning(0.25), chosen)
    assert {name.removesuffix(".weight") for name in report.layers} == expected


def test_a_modules_name_chooses_all_layers_inside() -> None:
    model = nn.ModuleDict({"a": tower(), "ab": nn.Linear(64, 64)})
    report = prune_(model, BlockPruning(0.25), "a")
    assert set(report.layers) == {"a.0.weight", "a.2.weight", "a.3.weight"}


@pytest.mark.parametrize("call", ["prune", "quantize"])
@pytest.mark.parametrize(
    ("chosen", "says"),
    [("tower.0", "'0'"), (re.compile("block.*"), "expression"), ("1", "holds"), (["0", "9"], "9")],
)
def test_a_name_that_no_layer_has_is_refused(call: str, chosen: object, says: str) -> None:
    model = tower()
    before = state(model)
    calls = {
        "prune": lambda: prune_(model, BlockPruning(0.25), chosen),
        "quantize": lambda: quantize_(model, Int8(), [torch.randn(4, 64)], chosen),
    }
    with pytest.raises(ArgumentError, match="filter_fn") as error:
        calls[call]()
    assert says in str(error.value)
    assert_untouched(model, before)


def test_a_filter_of_another_type_is_refused() -> None:
    with pytest.raises(DtypeError, match="filter_fn"):
        prune_(tower(), BlockPruning(0.25), 3)
    with pytest.raises(DtypeError, match="filter_fn"):
        quantize_(tower(), Int8(), [torch.randn(4, 64)], [1])


def test_a_threshold_for_each_layer_takes_the_same_share_of_each() -> None:
    together, apart = tower(), tower()
    everything = ["0", "2", "3"]
    prune_(together, BlockPruning(0.5, scale="none", max_layer_sparsity=1.0), everything)
    report = prune_(apart, BlockPruning(0.5, scale="none", scope="layer"), everything)
    assert zeros(together[2]) > 0.9
    assert [zeros(apart[i]) for i in (0, 2, 3)] == [0.5] * 3
    assert report.sparsity == 0.5
    before = state(apart)
    prune_(apart, BlockPruning(0.5, scale="none", scope="layer"), everything)
    assert_untouched(apart, before)


def test_schedules_reach_the_share_by_their_own_ways() -> None:
    shares = {
        name: [BlockPruning(0.8, rounds=4, schedule=name).share(r) for r in (1, 2, 3, 4)]
        for name in ("cubic", "linear")
    }
    assert shares["linear"] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares["cubic"] == pytest.approx([0.4625, 0.7, 0.7875, 0.8])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(0, 99))
def test_n_of_m_keeps_the_n_largest(n: int, m: int, rounds: int, seed: int) -> None:
    if n >= m:
        return
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48))
    weight = model[0].weight.detach().clone()
    report = prune_(model, NMPruning(n, m, rounds), "0")
    groups, before = model[0].weight.unflatten(1, (-1, m)), weight.unflatten(1, (-1, m))
    assert bool(((groups != 0).sum(-1) == n).all())
    assert report.sparsity == pytest.approx(1 - n / m)
    largest = before.abs().topk(n, -1).values.sum(-1)
    torch.testing.assert_close(groups.abs().sum(-1), largest)
    assert torch.equal(groups[groups != 0], before[groups != 0])


def test_n_of_m_grows_over_the_rounds_and_reaches_grouped_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GroupedLinear(64, 64, 2), SeparableProjection(64, 64, groups=4))
    seen: list[float] = []
    prune_(
        model,
        NMPruning(rounds=3, schedule="linear"),
        finetune=lambda m, r: seen.append(float((m[0].weight == 0).float().mean())),
    )
    # From 1/6 to 1/2 in equal steps, over both layers together.
    assert seen == sorted(seen)
    assert 0.05 < seen[0] < 0.3
    assert seen[-1] == 0.5
    assert float((model[1].pointwise == 0).float().mean()) == 0.5
    assert bool((model[1].depthwise != 0).all())


def test_tables_can_have_a_share_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(1000, 64), *tower())
    config = BlockPruning(
        0.5, embedding_block=(1, 1), embedding_sparsity=0.9, max_layer_sparsity=0.6
    )
    report = prune_(model, config, finetune=lambda model, round_: None)
    assert report.table_sparsity == pytest.approx(0.9, abs=1e-3)
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert zeros(model[0]) == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ArgumentError, match="embedding_sparsity"):
        BlockPruning(embedding_sparsity=1.0)


def test_n_of_m_refuses_inputs_that_are_no_whole_groups() -> None:
    model = nn.Sequential(nn.Linear(30, 32))
    before = state(model)
    with pytest.raises(ArgumentError, match="divide"):
        prune_(model, NMPruning(), "0")
    assert_untouched(model, before)


def test_a_block_that_does_not_divide_a_named_layer_is_refused_with_one_that_does() -> None:
    model = nn.Sequential(nn.Linear(30, 72))
    before = state(model)
    with pytest.raises(ArgumentError, match=r"\(8, 2\)"):
        prune_(model, BlockPruning(0.4), "0")
    assert_untouched(model, before)
    prune_(model, BlockPruning(0.4, block=(8, 2)), "0")
    assert zeros(model[0]) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, float("nan"), "0.4"])
def test_a_share_outside_its_range_is_refused(bad: object) -> None:
    with pytest.raises(ArgumentError, match="sparsity"):
        BlockPruning(bad)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (BlockPruning, {"scope": "model"}),
        (BlockPruning, {"schedule": "sudden"}),
        (BlockPruning, {"regrow": 1.0}),
        (NMPruning, {"n": 4}),
        (NMPruning, {"n": 0}),
        (NMPruning, {"m": 1, "n": 1}),
        (NMPruning, {"schedule": "sudden"}),
        (NMPruning, {"scale": "rms"}),
    ],
)
def test_bad_settings_are_refused(kind: type, values: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(values))):
        kind(**values)


def train(model: nn.Module, steps: int, seed: int) -> None:
    """Towards a target that needs inputs 0..3 alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x = torch.randn(64, 32, generator=generator)
        loss = (model(x) - x[:, :4].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_regrowth_brings_back_what_the_gradients_ask_for() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32))
        with torch.no_grad():
            model[0].weight[:, :4] *= 0.01  # what matters looks weakest
        return model

    kept = {}
    for regrow in (0.0, 0.3):
        model = make()
        config = BlockPruning(0.75, block=(32, 4), rounds=4, regrow=regrow, scale="none")
        report = prune_(model, config, "0", finetune=lambda m, r: train(m, 30, r))
        assert report.sparsity == 0.75
        assert zeros(model[0]) == 0.75
        kept[regrow] = bool((model[0].weight[:, :4] != 0).any())
    assert kept == {0.0: False, 0.3: True}


def test_a_finetune_that_fails_leaves_the_model_as_it_was() -> None:
    model = tower().eval()
    before = state(model)

    def finetune(module: nn.Module, round_: int) -> None:
        module.train()
        with torch.no_grad():
            module[0].bias.add_(1.0)
        if round_ == 2:
            raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        prune_(model, BlockPruning(0.5), "0", finetune=finetune)
    assert_untouched(model, before)
    assert not model.training
    assert not model[0].weight._backward_hooks


def test_quantize_that_fails_leaves_the_model_as_it_was() -> None:
    model = tower()
    kinds = copy.deepcopy([type(m) for m in model.modules()])
    before = state(model)
    for calibration in ([], [torch.full((4, 64), torch.nan)], None):
        with pytest.raises(ArgumentError, match="calibration"):
            quantize_(model, Int8(), calibration)
        assert [type(m) for m in model.modules()] == kinds
        assert_untouched(model, before)
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert model.training


def test_rows_pruned_as_blocks_stay_zero_in_an_int8_table() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(1024, 16), "out": nn.Linear(16, 16)})
    counts = torch.arange(1024)
    config = BlockPruning(0.5, embedding_block=(1, 16), rounds=1, frequency_power=1.0)
    prune_(model, config, "table", row_counts={"table": counts})
    gone = (model["table"].weight == 0).all(1)
    assert int(gone.sum()) == 512
    assert float(counts[gone].float().mean()) < float(counts[~gone].float().mean())

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = model["table"]

        def forward(self, ids: Tensor) -> Tensor:
            return self.items(ids)

    lookup = Lookup()
    quantize_(lookup, Int8(), [torch.arange(8)])
    assert torch.equal((lookup.items.weight == 0).all(1), gone)

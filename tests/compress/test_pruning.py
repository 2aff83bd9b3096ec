"""prune_: exact shares, monotone masks, zeros that survive any optimiser, and refusals."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrec.compress import BlockPruning, prune_
from fastrec.compress.blocks import block_counts, block_rms, expand_mask, select
from fastrec.errors import ArgumentError, DtypeError, ShapeError


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(96, 256), nn.ReLU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 1)
    )


def everything(module: nn.Module, name: str) -> bool:
    return True


def test_share_is_exact_and_blocks_are_whole() -> None:
    model = mlp()
    report = prune_(model, BlockPruning(sparsity=0.4))
    weights = [model[0].weight, model[2].weight]
    total = sum(w.numel() for w in weights)
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == report.sparsity * total
    assert 0.4 * total - 128 < zeros <= 0.4 * total
    for weight in weights:
        blocks = (weight != 0).view(weight.shape[0] // 32, 32, -1, 4).sum((1, 3))
        assert set(blocks.unique().tolist()) <= {0, 128}
    pruned = weights[0][weights[0] == 0]
    assert not bool(torch.signbit(pruned).any())  # no -0.0: pruned means all bits zero
    assert bool((model[4].weight != 0).all())  # the final 128 -> 1 layer stays dense
    assert set(report.layers) == {"0.weight", "2.weight"}


def test_the_weakest_blocks_go_and_theta_separates() -> None:
    weight = torch.arange(1.0, 9.0).repeat_interleave(4).view(1, 32).repeat(32, 1)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    model[0].weight.data.copy_(weight)
    report = prune_(model, BlockPruning(sparsity=0.5, rounds=1, scale="none"), everything)
    assert bool((model[0].weight[:, :16] == 0).all())
    torch.testing.assert_close(model[0].weight[:, 16:], weight[:, 16:])
    assert report.rounds[0].linear_threshold == pytest.approx(5.0)


def test_output_scale_makes_layers_comparable() -> None:
    raw, scaled = mlp(), mlp()
    for model in (raw, scaled):
        model[0].weight.data *= 100.0
    prune_(raw, BlockPruning(sparsity=0.3, scale="none"))
    report = prune_(scaled, BlockPruning(sparsity=0.3, scale="output"))
    assert int((raw[0].weight == 0).sum()) == 0
    assert all(layer.kept < 0.9 for layer in report.layers.values())


def test_output_scale_keeps_the_weaker_part_of_a_merged_projection() -> None:
    """q and k beside an identity for v, as the ranker's cross attention starts: the diagonal is
    what v is made of, and must outlive what surrounds it."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 192)
    with torch.no_grad():
        layer.weight[128:] = torch.eye(64) * 0.5 + torch.randn(64, 64) * 0.01
    model = nn.Sequential(layer)
    prune_(model, BlockPruning(sparsity=0.4, rounds=1), everything)
    assert bool((layer.weight[128:].diagonal() != 0).all())


def test_layers_of_another_spread_are_not_cut_to_the_cap_over_the_rounds() -> None:
    """The unit of the scores is fixed at the start; re-measured each round, it would run away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512))
    for layer in model[:2]:  # the third stays uniform
        nn.init.normal_(layer.weight)
    report = prune_(model, BlockPruning(sparsity=0.4, rounds=3, scale="output"))
    assert 0.55 < report.layers["2.weight"].kept < 0.75


def test_no_layer_is_emptied() -> None:
    model = mlp()
    model[0].weight.data *= 1e-3
    report = prune_(model, BlockPruning(sparsity=0.5, scale="none"))
    assert report.layers["0.weight"].kept >= 0.25
    assert report.sparsity == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize("shape", [(31, 3), (32, 4), (33, 5), (1, 1), (100, 50)])
def test_edge_blocks_are_scored_by_their_own_elements(shape: tuple[int, int]) -> None:
    scores = block_rms(torch.full(shape, 2.0), (32, 4))
    torch.testing.assert_close(scores.score, torch.full_like(scores.score, 2.0))
    assert scores.elements == shape[0] * shape[1]
    mask = expand_mask(torch.ones_like(scores.score, dtype=torch.bool), shape, (32, 4))
    assert mask.shape == shape


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 50)), min_size=1, max_size=4),
    block=st.tuples(st.integers(1, 33), st.integers(1, 9)),
    share=st.floats(0, 0.95),
    seed=st.integers(0, 99),
)
def test_select_reaches_the_share_within_one_block(
    shapes: list[tuple[int, int]], block: tuple[int, int], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [block_rms(torch.randn(s, generator=generator), block) for s in shapes]
    result = select(scores, share, cap=1.0)
    total = sum(s.elements for s in scores)
    largest = max(int(block_counts(s, block).max()) for s in shapes)
    assert share * total - largest < result.pruned_elements <= share * total + 1e-6
    pruned = sum(
        int((~expand_mask(keep, shape, block)).sum())
        for keep, shape in zip(result.keep, shapes, strict=True)
    )
    assert pruned == result.pruned_elements
    # theta separates: nothing pruned is stronger than anything kept
    kept = torch.cat([s.score[k] for s, k in zip(scores, result.keep, strict=True)])
    gone = torch.cat([s.score[~k] for s, k in zip(scores, result.keep, strict=True)])
    assert not len(kept) or not len(gone) or gone.max() <= kept.min()


def test_masks_only_grow_over_the_rounds_and_the_schedule_is_cubic() -> None:
    model, seen = mlp(), []

    def finetune(module: nn.Module, round_: int) -> None:
        assert round_ == len(seen) + 1
        seen.append((module[0].weight == 0).clone())
        with torch.no_grad():  # kept weights move between rounds
            module[0].weight.add_(torch.randn_like(module[0].weight) * 0.01)

    report = prune_(model, BlockPruning(sparsity=0.4, rounds=3), finetune=finetune)
    for earlier, later in itertools.pairwise(seen):
        assert bool((later | ~earlier).all())
    assert bool((model[0].weight[seen[-1]] == 0).all())
    assert [round(r.share, 3) for r in report.rounds] == [0.281, 0.385, 0.4]


def test_second_call_changes_nothing() -> None:
    model = mlp()
    prune_(model)
    before = copy.deepcopy(model.state_dict())
    prune_(model, finetune=lambda m, r: None)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_zeros_survive_fine_tuning_and_no_trace_is_left(optimiser: str) -> None:
    model = mlp()
    keys = list(model.state_dict())
    x, y = torch.randn(64, 96), torch.randn(64, 1)
    parameters = list(model.parameters())
    # One optimiser over all rounds: its momentum from earlier rounds must not revive pruned
    # weights.
    step = (
        torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        if optimiser == "adamw"
        else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    )
    losses = []

    def finetune(module: nn.Module, round_: int) -> None:
        for _ in range(5):
            step.zero_grad()
            loss = (module(x) - y).square().mean()
            loss.backward()
            step.step()
            losses.append(loss.item())

    report = prune_(model, BlockPruning(sparsity=0.4), finetune=finetune)
    for index in (0, 2):
        weight = model[index].weight
        assert int((weight == 0).sum()) == round(
            (1 - report.layers[f"{index}.weight"].kept) * weight.numel()
        )
        assert not weight._backward_hooks
    assert losses[-1] < losses[0]
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.GELU, nn.Linear]


def test_hooks_go_when_fine_tuning_fails() -> None:
    model = mlp()

    def finetune(module: nn.Module, round_: int) -> None:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        prune_(model, finetune=finetune)
    assert not model[0].weight._backward_hooks


def test_tables_are_pruned_apart_from_layers_and_rare_rows_go_first() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"item": nn.Embedding(2000, 16), "head": nn.Linear(16, 8)})
    counts = torch.zeros(2000)
    counts[:1000] = 1000
    report = prune_(
        model, BlockPruning(sparsity=0.4, frequency_power=0.5), row_counts={"item": counts}
    )
    zero = model["item"].weight == 0
    assert report.sparsity is None
    assert report.table_sparsity == pytest.approx(0.4, abs=1e-4)
    assert zero[1000:].float().mean() > 0.75
    assert zero[:1000].float().mean() < 0.05
    assert bool((model["head"].weight != 0).all())


def test_sparse_gradients_of_tables_are_masked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 8, sparse=True))

    def finetune(module: nn.Module, round_: int) -> None:
        step = torch.optim.SGD(module.parameters(), lr=1.0)
        module(torch.arange(1000)).sum().backward()
        step.step()

    report = prune_(model, BlockPruning(sparsity=0.5, rounds=1), finetune=finetune)
    assert int((model[0].weight == 0).sum()) == report.table_sparsity * 8000 == 4000


def test_small_tables_stay_dense_and_none_leaves_all_tables() -> None:
    model = nn.ModuleDict({"position": nn.Embedding(100, 128), "item": nn.Embedding(1000, 8)})
    report = prune_(model)
    assert list(report.layers) == ["item.weight"]
    with pytest.raises(ArgumentError, match="linear layers"):
        prune_(model, BlockPruning(embedding_block=None))


def test_tied_weight_is_pruned_once() -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(1000, 32), nn.Linear(32, 1000, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head})
    report = prune_(model, BlockPruning(sparsity=0.25))
    assert list(report.layers) == ["head.weight"]
    assert int((table.weight == 0).sum()) == report.sparsity * 32000


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"rounds": 0}, "rounds"),
        ({"block": (0, 4)}, "block"),
        ({"block": 4}, "block"),
        ({"embedding_block": (1,)}, "embedding_block"),
        ({"scale": "global"}, "scale"),
        ({"max_layer_sparsity": 0.1}, "max_layer_sparsity"),
    ],
)
def test_bad_configuration(arguments: dict, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        BlockPruning(**arguments)


def test_bad_models_are_refused_untouched() -> None:
    with pytest.raises(DtypeError, match="model"):
        prune_([nn.Linear(64, 64)])
    with pytest.raises(DtypeError, match="config"):
        prune_(mlp(), {"sparsity": 0.4})
    with pytest.raises(DtypeError, match="filter_fn"):
        prune_(mlp(), filter_fn=7)
    with pytest.raises(ArgumentError, match="model: expected linear layers"):
        prune_(nn.Sequential(nn.Linear(8, 1)))
    broken = mlp()
    broken[2].weight.data[3, 3] = float("nan")
    before = broken[0].weight.clone()
    with pytest.raises(ArgumentError, match=r"2\.weight"):
        prune_(broken)
    assert torch.equal(broken[0].weight, before)
    with pytest.raises(ArgumentError, match="row_counts"):
        prune_(mlp(), row_counts={"item": [1]})
    table = nn.Sequential(nn.Embedding(1000, 8))
    with pytest.raises(ShapeError, match="row_counts"):
        prune_(table, row_counts={"0": [1, 2]})


def test_share_beyond_the_cap_is_refused_untouched() -> None:
    model = nn.Sequential(*[nn.Linear(4, 32) for _ in range(10)])  # one block each
    with pytest.raises(ArgumentError, match="max_layer_sparsity"):
        prune_(model, BlockPruning(sparsity=0.4), everything)
    assert all(bool((layer.weight != 0).all()) for layer in model)

"""Encoders of window-sparse attention and of grouped, separable and low-rank projections."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from fastrec import AttentionPattern
from fastrec.errors import ArgumentError, DtypeError
from fastrec.models import (
    EncoderConfig,
    Ranker,
    RankerConfig,
    SASRec,
    SASRecConfig,
    record_attention,
)
from fastrec.nn import GroupedLinear, LowRankLinear, SeparableProjection, WindowSparseAttention

NARROW = AttentionPattern(window=1, offsets="log2")
WIDE = AttentionPattern(window=32, offsets="none")
ENCODERS = {
    "window": EncoderConfig(NARROW),
    "window, grouped": EncoderConfig(NARROW, "grouped", "grouped", groups=4),
    "window, separable": EncoderConfig(NARROW, "separable", kernel_size=3),
    "window, low rank": EncoderConfig(NARROW, "low_rank", "low_rank", rank=6, qk_rank=2),
    "dense, grouped": EncoderConfig(None, "grouped", groups=2),
    "dense, separable": EncoderConfig(None, "separable", kernel_size=3, groups=2),
    "dense, low rank": EncoderConfig(None, "low_rank", rank=6, qk_rank=3),
}


def ranker_config(encoder: EncoderConfig) -> RankerConfig:
    return RankerConfig(
        n_items=60,
        n_categories=9,
        history_length=12,
        d=16,
        category_dim=8,
        ffn=32,
        tower=(24, 24),
        encoder=encoder,
    )


def ranker_inputs(batch: int = 4, size: int = 12, m: int = 5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    item = torch.randint(1, 60, (batch, size), generator=g)
    category = torch.randint(1, 9, (batch, size), generator=g)
    behaviour = torch.randint(1, 5, (batch, size), generator=g)
    length = torch.tensor([0, 1, 7, 12, 3])[:batch].clamp_max(size)
    cand_item = torch.randint(1, 60, (batch, m), generator=g)
    cand_category = torch.randint(1, 9, (batch, m), generator=g)
    return item, category, behaviour, length, cand_item, cand_category


def make_ranker(encoder: EncoderConfig) -> Ranker:
    torch.manual_seed(0)
    return Ranker(ranker_config(encoder)).eval()


def make_sasrec(encoder: EncoderConfig) -> SASRec:
    torch.manual_seed(0)
    return SASRec(SASRecConfig(n_items=60, max_length=12, d=16, ffn=32, encoder=encoder)).eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_what_lies_beyond_the_length_changes_no_score(name: str) -> None:
    model = make_ranker(ENCODERS[name])
    item, category, behaviour, length, *candidates = ranker_inputs()
    beyond = torch.arange(12)[None] >= length[:, None]
    with torch.no_grad():
        scores = model(item, category, behaviour, length, *candidates)
        item, category = torch.where(beyond, 0, item), torch.where(beyond, 0, category)
        changed = model(item, category, behaviour, length, *candidates)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores, changed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_sasrec_stays_causal(name: str) -> None:
    model = make_sasrec(ENCODERS[name])
    item = torch.randint(1, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    later = item.clone()
    later[:, 6:] = 1
    length = torch.tensor([10, 10])
    with torch.no_grad():
        states, changed = model(item, length), model(later, length)
    torch.testing.assert_close(states[:, :6], changed[:, :6], atol=1e-6, rtol=0)
    assert not torch.allclose(states[:, 6:], changed[:, 6:])


@pytest.mark.parametrize("causal", [False, True])
def test_a_wide_window_is_dense_attention_with_the_same_state_dict(causal: bool) -> None:
    make = make_sasrec if causal else make_ranker
    dense, wide = make(EncoderConfig()), make(EncoderConfig(WIDE))
    wide.load_state_dict(dense.state_dict())
    inputs = (ranker_inputs()[0], torch.full((4,), 12)) if causal else ranker_inputs()
    with torch.no_grad():
        torch.testing.assert_close(dense(*inputs), wide(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("causal", [False, True])
def test_training_reaches_every_parameter_and_lowers_the_loss(name: str, causal: bool) -> None:
    model: torch.nn.Module
    if causal:
        model = make_sasrec(ENCODERS[name])
        inputs = (ranker_inputs()[0], torch.full((4,), 12))
    else:
        model = make_ranker(ENCODERS[name])
        inputs = ranker_inputs(m=6)
    target = torch.arange(4) % 5

    def loss_of() -> Tensor:
        out = model(*inputs)
        out = model.logits(out)[:, -1] if isinstance(model, SASRec) else out
        return torch.nn.functional.cross_entropy(out, target)

    model.train()
    first = loss_of()
    first.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A key's bias moves all scores of a query alike; the ranker's last bias all candidates.
    assert not {n for n in silent if "bias" not in n and "depthwise" not in n}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.step()
    assert loss_of() < first


@pytest.mark.parametrize("name", ENCODERS)
def test_export_with_dynamic_batch(name: str) -> None:
    model = make_ranker(ENCODERS[name])
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in range(6))
    program = torch.export.export(model, ranker_inputs(3), dynamic_shapes=shapes)
    for size in (1, 5):
        inputs = ranker_inputs(size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("name", ENCODERS)
def test_recorded_maps_change_no_score_and_keep_to_the_pattern(name: str) -> None:
    model = make_ranker(ENCODERS[name])
    inputs = ranker_inputs()
    with torch.no_grad():
        plain = model(*inputs)
        with record_attention(model) as maps:
            recorded = model(*inputs)
    torch.testing.assert_close(plain, recorded, atol=1e-5, rtol=1e-5)
    assert [m.shape for m in maps] == [(4, 4, 12, 12)] * 2 + [(4, 4, 5, 12)]
    if ENCODERS[name].pattern is not None:
        unseen = ~NARROW.mask(12)
        assert not maps[0].weights().masked_select(unseen).any()


def test_the_modules_are_those_asked_for() -> None:
    block = make_ranker(ENCODERS["window, grouped"]).blocks[0]
    assert isinstance(block.attention, WindowSparseAttention)
    assert isinstance(block.attention.in_proj, GroupedLinear)
    assert isinstance(block.ffn[0], GroupedLinear)
    block = make_ranker(ENCODERS["dense, separable"]).blocks[0]
    assert isinstance(block.attention.out_proj, SeparableProjection)
    block = make_ranker(ENCODERS["dense, low rank"]).blocks[0]
    assert isinstance(block.attention.in_proj, LowRankLinear)
    assert type(block.ffn[0]) is torch.nn.Linear


@pytest.mark.parametrize("name", ENCODERS)
def test_configs_round_trip_through_json_and_count_parameters(name: str) -> None:
    config = ranker_config(ENCODERS[name])
    assert RankerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for sized in (config, config.student(share=0.7)):
        with torch.device("meta"):
            count = sum(p.numel() for p in Ranker(sized).parameters())
        assert sized.n_parameters() == count
    sasrec = SASRecConfig(n_items=60, d=16, encoder=ENCODERS[name])
    assert SASRecConfig.from_dict(json.loads(json.dumps(sasrec.to_dict()))) == sasrec


def test_configs_from_before_the_option_are_read() -> None:
    config = ranker_config(EncoderConfig())
    values = config.to_dict()
    del values["encoder"]
    assert RankerConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"projection": "sparse"}, "projection"),
        ({"ffn_projection": "separable"}, "ffn_projection"),
        ({"projection": "low_rank"}, "rank"),
        ({"projection": "low_rank", "rank": 17}, "rank"),
        ({"ffn_projection": "low_rank", "rank": 0}, "rank"),
        ({"projection": "grouped", "groups": 3}, "groups"),
        ({"groups": 2.0}, "groups"),
        ({"projection": "separable", "kernel_size": 2}, "kernel_size"),
        ({"projection": "separable", "kernel_size": 33}, "kernel_size"),
        ({"qk_rank": 5}, "qk_rank"),
        ({"pattern": AttentionPattern(1, [[1], [2], [3]])}, "pattern"),
        ({"pattern": {"width": 3}}, "pattern"),
        ({"pattern": {"window": -1}}, "window"),
    ],
)
def test_options_that_do_not_fit_are_named(change: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ranker_config(dataclasses.replace(EncoderConfig(), **change))  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_other_types_are_refused() -> None:
    with pytest.raises(DtypeError, match="pattern"):
        EncoderConfig(pattern=3)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="encoder"):
        RankerConfig(5, 5, encoder="grouped")  # type: ignore[arg-type]

"""SASRec: causality, tied table, shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastrec import QAT, quantize_
from fastrec.errors import ArgumentError, IdRangeError, ShapeError
from fastrec.models import MODELS, SASRec, SASRecConfig, record_attention, validate_inputs

TINY = SASRecConfig(n_items=30, max_length=10, d=16, ffn=32)


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(0)
    return SASRec(TINY).eval()


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 7), (3, 10)])
def test_shapes(model: SASRec, batch: int, size: int) -> None:
    item, length = torch.randint(1, 30, (batch, size)), torch.full((batch,), size)
    hidden = model(item, length)
    assert hidden.shape == (batch, size, 16)
    assert model.logits(hidden).shape == (batch, size, 30)


def test_later_events_change_no_earlier_state(model: SASRec) -> None:
    item = torch.randint(1, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = item.clone()
    changed[:, 5:] = 0
    length = torch.tensor([8, 8])
    with torch.no_grad():
        assert torch.allclose(model(item, length)[:, :5], model(changed, length)[:, :5], atol=1e-6)


def test_last_state_is_that_of_the_newest_event(model: SASRec) -> None:
    item = torch.randint(1, 30, (3, 8), generator=torch.Generator().manual_seed(0))
    length = torch.tensor([8, 3, 0])
    with torch.no_grad():
        hidden, last = model(item, length), model.last_state(item, length)
    assert torch.equal(last[0], hidden[0, 7])
    assert torch.equal(last[1], hidden[1, 2])
    assert not last[2].any()


def test_gradients_reach_every_parameter(model: SASRec) -> None:
    item = torch.randint(1, 30, (4, 10))
    loss = torch.nn.functional.cross_entropy(
        model.train().logits(model(item, torch.full((4,), 10))).flatten(0, 1), item.flatten()
    )
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_recorded_maps_are_causal(model: SASRec) -> None:
    item, length = torch.randint(1, 30, (2, 6)), torch.tensor([6, 6])
    with torch.no_grad():
        plain = model(item, length)
        with record_attention(model) as maps:
            recorded = model(item, length)
    assert torch.allclose(plain, recorded, atol=1e-5)
    assert len(maps) == 2
    assert all(not m.weights().triu(1).any() for m in maps)


def test_the_input_is_scaled_and_the_scores_are_not(model: SASRec) -> None:
    scaled = SASRec(dataclasses.replace(TINY, input_scale=4.0)).eval()
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        for table in (model.item_embedding, model.position_embedding):
            table.weight.mul_(4)
        item, length = torch.randint(1, 30, (2, 7)), torch.tensor([7, 7])
        torch.testing.assert_close(scaled(item, length), model(item, length))
        assert torch.equal(scaled.item_table() * 4, model.item_table())
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="input_scale"):
            SASRecConfig(n_items=5, input_scale=scale)


def test_scores_in_training_see_the_table_that_will_be_served(model: SASRec) -> None:
    # A pruned block must not come back to life on the scoring side of a tied table.
    with torch.no_grad():
        model.item_embedding.weight[3, :4] = 0
    calibration = [(torch.randint(1, 30, (4, 10)), torch.full((4,), 10))]
    quantize_(model, QAT("prepare"), calibration=calibration, filter_fn=lambda module, name: True)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        model.zero_grad()
        model.logits(model(*calibration[0])).square().mean().backward()
        optimizer.step()
    assert not model.item_table()[3, :4].any()
    trained = model.item_table().detach()
    quantize_(model, QAT("convert"))
    torch.testing.assert_close(model.item_table(), trained, rtol=1e-6, atol=1e-7)


def test_config_and_inputs_are_checked() -> None:
    assert MODELS["sasrec"] == (SASRec, SASRecConfig)
    assert SASRecConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ArgumentError, match="d"):
        SASRecConfig(n_items=5, d=7)
    with pytest.raises(ArgumentError, match="width"):
        SASRecConfig.from_dict({"n_items": 5, "width": 3})
    item = torch.ones(2, 5, dtype=torch.int64)
    validate_inputs(TINY, item, torch.tensor([5, 0]))
    with pytest.raises(IdRangeError, match="length"):
        validate_inputs(TINY, item, torch.tensor([6, 0]))
    with pytest.raises(ShapeError, match="item"):
        validate_inputs(TINY, torch.ones(2, 11, dtype=torch.int64), torch.tensor([5, 0]))

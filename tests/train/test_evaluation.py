"""Protocols: what is ranked, by whom, and that the paths through a model agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrec.errors import ArgumentError, ShapeError
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.train import evaluate
from fastrec.train.evaluation import latest


@pytest.fixture
def model(tiny: RankerConfig) -> Ranker:
    torch.manual_seed(0)
    return Ranker(tiny)


def test_a_constant_scorer_scores_nothing(dataset) -> None:  # type: ignore[no-untyped-def]
    for protocol in ("candidates", "full", "sampled:20"):
        found = evaluate(
            lambda *inputs: torch.zeros(inputs[4].shape), dataset, protocol=protocol, ks=(5,)
        )
        assert found.metrics["hit_rate_5"] == 0
        assert found.ranks.tolist() == [found.n_candidates - 1] * dataset.n_users


def test_an_oracle_scores_one_and_gets_numpy_back(dataset) -> None:  # type: ignore[no-untyped-def]
    target = {u: e[-1] for u, e in enumerate(dataset.events)}
    batches = iter(
        list(dataset.batches("test", batch_size=64, n_candidates=50, seed=3, shuffle=False))
    )

    def oracle(*inputs: torch.Tensor) -> np.ndarray:
        wanted = np.array([target[int(u)] for u in next(batches).user])
        return (inputs[4].numpy() == wanted[:, None]).astype(np.float32)

    found = evaluate(oracle, dataset, seed=3)
    assert found.metrics["hit_rate_1"] == found.metrics["mrr"] == 1
    assert found.users.tolist() == list(range(dataset.n_users))


def test_full_agrees_with_one_call_over_the_catalogue(  # type: ignore[no-untyped-def]
    model, dataset, monkeypatch
) -> None:
    monkeypatch.setattr("fastrec.train.evaluation.FULL_CHUNK", 7)
    chunked = evaluate(model, dataset, protocol="full")
    plain = evaluate(lambda *inputs: model(*inputs), dataset, protocol="full")
    expected = []
    model.eval()
    items = torch.arange(1, dataset.n_items)
    for batch in dataset.batches("test", batch_size=1, n_candidates=1, shuffle=False):
        history = [torch.from_numpy(a) for a in batch.inputs()[:4]]
        categories = torch.from_numpy(dataset.item_category.astype(np.int64))[items]
        with torch.no_grad():
            scores = model(*history, items[None], categories[None])[0]
        expected.append(int((scores > scores[batch.cand_item[0, 0] - 1]).sum()))
    assert np.abs(chunked.ranks - expected).max() <= 1  # chunk sizes round differently
    assert np.mean(chunked.ranks == expected) > 0.95
    assert np.mean(plain.ranks == chunked.ranks) > 0.95
    assert chunked.n_candidates == dataset.n_items - 1


def test_exclude_seen_removes_the_history_but_never_the_target(dataset) -> None:  # type: ignore[no-untyped-def]
    def prefers_history(*inputs: torch.Tensor) -> torch.Tensor:
        return (inputs[4][:, :, None] == inputs[0][:, None, :]).any(-1).float()

    seen = evaluate(prefers_history, dataset, protocol="full")
    unseen = evaluate(prefers_history, dataset, protocol="full", exclude_seen=True)
    assert (unseen.ranks <= seen.ranks).all()
    # A target from the history beats all that is left; any other ties with all that is left.
    in_history = [dataset.events[u][-1] in dataset.events[u][-13:-1] for u in seen.users]
    assert (unseen.ranks[in_history] == 0).all()


def test_same_seed_same_candidates_and_the_mode_comes_back(model, dataset) -> None:  # type: ignore[no-untyped-def]
    model.train()
    a = evaluate(model, dataset, seed=1, limit=30)
    b = evaluate(model, dataset, seed=1, limit=30, batch_size=7)
    assert model.training
    assert a.n_users == 30
    assert a.ranks.shape == b.ranks.shape


def test_progress_and_autocast(model, dataset) -> None:  # type: ignore[no-untyped-def]
    done: list[int] = []
    found = evaluate(model, dataset, autocast=torch.bfloat16, on_batch=done.append, limit=70)
    assert done == [64, 70]
    assert found.n_users == 70


def test_sasrec_is_ranked_by_its_last_state(dataset) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(dataset.n_items, max_length=5, d=8, ffn=16))
    full = evaluate(model, dataset, protocol="full", exclude_seen=True)
    sampled = evaluate(model, dataset, protocol="sampled:10")
    assert full.n_users == sampled.n_users == dataset.n_users
    batch = next(iter(dataset.batches("test", batch_size=1, n_candidates=1, shuffle=False)))
    item, length = torch.from_numpy(batch.item), int(batch.length[0])
    newest = item[:, max(0, length - 5) : length]
    with torch.no_grad():
        scores = model.logits(model.eval()(newest, torch.tensor([newest.shape[1]]))[:, -1])[0]
    counted = torch.ones(dataset.n_items, dtype=torch.bool)
    counted[item[0]] = False
    counted[0] = False
    target = int(batch.cand_item[0, 0])
    counted[target] = False
    assert full.ranks[0] == int((scores[counted] >= scores[target]).sum())


def test_latest_keeps_the_newest() -> None:
    item = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [0, 0, 0, 0, 0]])
    cropped, length = latest(item, torch.tensor([5, 2, 0]), 3)
    assert cropped.tolist() == [[3, 4, 5], [6, 7, 0], [0, 0, 0]]
    assert length.tolist() == [3, 2, 0]
    same, _ = latest(item, torch.tensor([5, 2, 0]), 5)
    assert same is item


@pytest.mark.parametrize("protocol", ["all", "sampled:", "sampled:x", "sampled:-3", "sampled:1"])
def test_unknown_protocol_is_an_error(model, dataset, protocol: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=r"protocol|n_candidates"):
        evaluate(model, dataset, protocol=protocol)


def test_wrong_score_shape_and_empty_split_are_errors(model, dataset) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ShapeError, match="model"):
        evaluate(lambda *inputs: torch.zeros(len(inputs[0])), dataset)
    with pytest.raises(ArgumentError, match="split"):
        evaluate(model, dataset, limit=0)

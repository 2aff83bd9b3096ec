"""A dot product that decides which candidates the deep tower sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fastrec
from fastrec.errors import ArgumentError, ArtifactError, BackendError, IdRangeError
from fastrec.exporters.model_spec import spec_of
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.screening import Screen, Screened, fit, recall

CONFIG = RankerConfig(
    n_items=200, n_categories=20, history_length=8, d=16, category_dim=8, n_blocks=1, n_heads=2,
    ffn=16, tower=(16,),
)  # fmt: skip


def compiled(quantised: bool = False):
    torch.manual_seed(0)
    model = Ranker(CONFIG).eval()
    spec = spec_of(model, ())
    if quantised:
        batches = [
            tuple(map(torch.from_numpy, spec.sample({"B": 4, "m": 9}, seed=s))) for s in (1, 2)
        ]
        fastrec.quantize_(model, fastrec.Int8(), calibration=batches)
    examples = spec.sample({"m": 5})
    return fastrec.compile(model, examples, "native", threads=1, settings={"executor": "plan"})


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "int8"])
def engine(request):
    return compiled(request.param)


@pytest.fixture(scope="module")
def screen(engine):
    return fit(engine, [requests(engine, seed, 30, 16) for seed in range(40)], rank=16)


def requests(engine, seed: int, candidates: int, users: int = 1):
    return engine.spec.sample({"B": users, "m": candidates}, seed=1000 + seed)


def test_the_best_candidates_survive_far_more_often_than_by_chance(engine, screen) -> None:
    others = [requests(engine, 100 + seed, 100, 8) for seed in range(4)]
    told = recall(engine, screen, others, keep=20, k=5)
    # A screen that draws lots keeps a fifth, give or take 0.03 (160 draws); an untrained tower is
    # hard to follow, and this is beyond four of those.
    assert told["chance"] == 0.2
    assert told["recall"] > 0.35, told
    assert told["users"] == 32
    everything = recall(engine, screen, others, keep=99, k=5)
    assert everything["recall"] >= 0.97


def test_kept_candidates_have_the_engines_scores_and_come_first(engine, screen) -> None:
    inputs = requests(engine, 7, 60, 3)
    whole = engine(*inputs)
    scores = Screened(engine, screen, keep=15)(*inputs)
    assert scores.shape == whole.shape
    assert scores.dtype == whole.dtype
    order = np.argsort(-scores, axis=1)
    first, rest = order[:, :15], order[:, 15:]
    np.testing.assert_array_equal(
        np.take_along_axis(scores, first, 1), np.take_along_axis(whole, first, 1)
    )
    assert np.isfinite(scores).all()
    assert (
        np.take_along_axis(scores, rest, 1).max(1) < np.take_along_axis(scores, first, 1).min(1)
    ).all()


@pytest.mark.parametrize("candidates", [1, 8, 15])
def test_small_requests_are_not_touched(engine, screen, candidates: int) -> None:
    inputs = requests(engine, 3, candidates, 2)
    np.testing.assert_array_equal(Screened(engine, screen, keep=15)(*inputs), engine(*inputs))


def test_audits_come_at_their_rate(engine, screen) -> None:
    screened = Screened(engine, screen, keep=20, audit=0.25, audit_k=5)
    told = []
    for seed in range(12):
        screened(*requests(engine, seed, 60, 2))
        told.append(screened.recall)
    found = [t for t in told if t is not None]
    assert len(found) == 3
    assert all(0 <= t <= 1 for t in found)
    screened(*requests(engine, 0, 10))
    assert screened.recall is None


def test_bad_candidates_are_refused_though_few_are_scored(engine, screen) -> None:
    inputs = list(requests(engine, 5, 60))
    inputs[4] = inputs[4].copy()
    inputs[4][0, -1] = CONFIG.n_items
    with pytest.raises(IdRangeError, match="cand_item"):
        Screened(engine, screen, keep=15)(*inputs)


def test_a_screen_is_kept_in_a_file(engine, screen, tmp_path: Path) -> None:
    screen.save(tmp_path / "s.npz")
    again = Screen.load(tmp_path / "s.npz")
    inputs = requests(engine, 9, 60, 2)
    np.testing.assert_array_equal(
        Screened(engine, screen, 15)(*inputs), Screened(engine, again, 15)(*inputs)
    )
    for damage in (b"", b"no archive", (tmp_path / "s.npz").read_bytes()[:200]):
        (tmp_path / "bad.npz").write_bytes(damage)
        with pytest.raises(ArtifactError, match="not a screen"):
            Screen.load(tmp_path / "bad.npz")
    with pytest.raises(ArtifactError):
        Screen.load(tmp_path / "none.npz")


def test_what_does_not_fit_is_named(engine, screen) -> None:
    with pytest.raises(ArgumentError, match="keep"):
        Screened(engine, screen, keep=7)
    with pytest.raises(ArgumentError, match="audit"):
        Screened(engine, screen, keep=20, audit=2.0)
    with pytest.raises(ArgumentError, match="audit_k"):
        Screened(engine, screen, keep=20, audit_k=21)
    other = Screen(screen.mean, screen.into, screen.constant, ((4, 7, 16), (5, 20, 8)))
    with pytest.raises(ArgumentError, match="screen"):
        Screened(engine, other, keep=20)
    with pytest.raises(ArgumentError, match="requests"):
        fit(engine, [requests(engine, 0, 10, 2)])
    with pytest.raises(ArgumentError, match="requests"):
        recall(engine, screen, [requests(engine, 0, 10)], keep=10, k=5)
    with pytest.raises(ArgumentError, match="requests"):
        recall(engine, screen, [], keep=10, k=5)

    class InOnePiece:
        spec = engine.spec

    with pytest.raises(BackendError, match="native"):
        fit(InOnePiece(), [])

"""Ranks, metrics and bootstrap intervals against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastrec.errors import ArgumentError, ShapeError
from fastrec.train import Evaluation, bootstrap_ci, paired_difference, paired_ratio
from fastrec.train.metrics import gains, metric_names, ranks_from_scores


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 8)),
        elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.nan, np.inf]),
    ),
    st.integers(0, 7),
)
def test_ranks_match_a_loop(scores: np.ndarray, column: int) -> None:
    label = np.full(len(scores), column % scores.shape[1])
    for row, rank in zip(scores, ranks_from_scores(scores, label), strict=True):
        positive = row[label[0]]
        beaten = sum(1 for j, s in enumerate(row) if j != label[0] and s < positive)
        assert rank == len(row) - 1 - beaten


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 60))
def test_gains_match_a_loop(ranks: list[int], k: int) -> None:
    array = np.array(ranks)
    for i, rank in enumerate(ranks):
        assert gains(array, f"hit_rate_{k}")[i] == (1.0 if rank < k else 0.0)
        expected = 1 / math.log2(rank + 2) if rank < k else 0.0
        assert gains(array, f"ndcg_{k}")[i] == pytest.approx(expected)
        assert gains(array, "mrr")[i] == pytest.approx(1 / (rank + 1))


def test_a_constant_or_nan_scorer_comes_last() -> None:
    label = np.array([0, 3])
    for scores in (np.zeros((2, 5)), np.full((2, 5), np.nan)):
        assert ranks_from_scores(scores, label).tolist() == [4, 4]
    only_positive_is_nan = np.array([[np.nan, 1.0, 2.0]])
    assert ranks_from_scores(only_positive_is_nan, np.array([0])).tolist() == [2]


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match="scores"):
        ranks_from_scores(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ShapeError, match="label"):
        ranks_from_scores(np.zeros((3, 2)), np.zeros(2, int))
    with pytest.raises(ShapeError, match="values"):
        bootstrap_ci(np.zeros(0))


@pytest.mark.parametrize("name", ["hit_rate", "hit_rate_0", "ndcg_x", "auc", "mrr_5"])
def test_unknown_metric_is_an_error(name: str) -> None:
    with pytest.raises(ArgumentError, match="metric"):
        gains(np.zeros(3, int), name)


def test_hit_rate_that_is_one_by_construction_is_left_out() -> None:
    assert metric_names((1, 10, 50), 50) == [
        "hit_rate_1",
        "ndcg_1",
        "hit_rate_10",
        "ndcg_10",
        "ndcg_50",
        "mrr",
    ]
    assert "hit_rate_50" in metric_names((50,), 51)
    evaluation = Evaluation.from_ranks(np.array([49, 0]), n_candidates=50)
    assert "hit_rate_50" not in evaluation.metrics
    assert set(evaluation.metrics) == set(evaluation.ci95)


def test_evaluation_rejects_impossible_ranks() -> None:
    with pytest.raises(ArgumentError, match="ranks"):
        Evaluation.from_ranks(np.array([0, 50]), n_candidates=50)
    with pytest.raises(ArgumentError, match="ranks"):
        Evaluation.from_ranks(np.array([], int), n_candidates=50)


def test_interval_matches_the_plain_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values = gains(rng.integers(0, 50, 400), "ndcg_10")
    low, high = bootstrap_ci(values, resamples=4000)
    plain = values[rng.integers(0, 400, (4000, 400))].mean(1)
    # Both ends are quantiles of 4,000 draws: their own spread is about 4 % of the width.
    np.testing.assert_allclose(
        [low, high], np.percentile(plain, [2.5, 97.5]), atol=0.12 * (high - low)
    )
    assert bootstrap_ci(values) == bootstrap_ci(values)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        low, high = bootstrap_ci((rng.random(200) < 0.4).astype(float), resamples=400, seed=seed)
        covered += low <= 0.4 <= high
    # 300 tries at 0.95: standard error 0.0126; five of them either side.
    assert 0.88 <= covered / 300 <= 1.0


def test_constant_values_have_a_point_interval() -> None:
    assert bootstrap_ci(np.ones(50)) == (1.0, 1.0)


def test_paired_difference_is_tighter_than_unpaired() -> None:
    rng = np.random.default_rng(2)
    ranks = rng.integers(0, 50, 1000)
    worse = np.minimum(ranks + (rng.random(1000) < 0.1) * 10, 49)
    a = Evaluation.from_ranks(ranks, n_candidates=50)
    b = Evaluation.from_ranks(worse, n_candidates=50)
    difference, low, high = paired_difference(a, b, "hit_rate_10")
    assert difference == pytest.approx(a.metrics["hit_rate_10"] - b.metrics["hit_rate_10"])
    assert 0 <= low <= difference <= high
    own_low, own_high = a.ci95["hit_rate_10"]
    assert high - low < 0.6 * (own_high - own_low)
    assert paired_difference(a, a, "mrr") == (0.0, 0.0, 0.0)


def test_a_paired_ratio_is_that_of_the_means() -> None:
    rng = np.random.default_rng(3)
    ranks = rng.integers(0, 99, 500)
    a = Evaluation.from_ranks(np.minimum(ranks + 1, 99), n_candidates=100)
    b = Evaluation.from_ranks(ranks, n_candidates=100)
    found = paired_ratio(a, b, "mrr")
    assert found is not None
    ratio, low, high = found
    assert ratio == pytest.approx(a.metrics["mrr"] / b.metrics["mrr"])
    assert low < ratio < high < 1
    # Both means come of the same users: of a model and itself nothing varies.
    assert paired_ratio(b, b, "hit_rate_10") == (1.0, 1.0, 1.0)
    nothing = Evaluation.from_ranks(np.full(500, 99), n_candidates=100)
    assert paired_ratio(b, nothing, "hit_rate_10") is None
    assert paired_ratio(nothing, b, "hit_rate_10") == (0.0, 0.0, 0.0)


def test_pairing_needs_the_same_users_and_protocol() -> None:
    a = Evaluation.from_ranks(np.array([1, 2]), n_candidates=50)
    b = Evaluation.from_ranks(np.array([1, 2]), n_candidates=50, users=np.array([5, 6]))
    c = Evaluation.from_ranks(np.array([1, 2]), n_candidates=100, protocol="full")
    for other in (b, c):
        with pytest.raises(ArgumentError, match="b:"):
            paired_difference(a, other, "mrr")
        with pytest.raises(ArgumentError, match="b:"):
            paired_ratio(a, other, "mrr")

"""Ranking metrics from ranks, with bootstrap intervals over users.

A rank counts from 0 (best). Everything here is a function of ranks alone, which makes the bootstrap
cheap: a resample of users is a multinomial draw over the distinct values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrec.errors import ArgumentError, ShapeError

_METRIC = re.compile(r"(hit_rate|ndcg)_([1-9][0-9]*)|mrr")
RESAMPLES = 1_000


def ranks_from_scores(scores: NDArray[Any], label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank of the positive among its candidates.

    Ties are counted against the positive (every candidate that it does not beat ranks above it),
    and so is NaN: a scorer that gives everything the same score, or no number at all, comes last.

    Args:
        scores: float [users, m].
        label: int64 [users], column of the positive.

    Returns:
        int64 [users], 0 (best) to m - 1.

    Raises:
        ShapeError: shapes do not fit each other.
    """
    scores, label = np.asarray(scores), np.asarray(label)
    if scores.ndim != 2:
        raise ShapeError("scores", "shape [users, m]", f"shape {list(scores.shape)}")
    if label.shape != scores.shape[:1]:
        raise ShapeError("label", f"shape [{len(scores)}]", f"shape {list(label.shape)}")
    positive = np.take_along_axis(scores, label[:, None], axis=1)
    return (~(scores < positive)).sum(axis=1).astype(np.int64) - 1


def gains(ranks: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """Value of one metric for each user, in [0, 1].

    ``hit_rate_k``: 1 if the positive is among the first k. ``ndcg_k``: 1 / log2(rank + 2) if it is,
    else 0 (one relevant item, so the ideal DCG is 1). ``mrr``: 1 / (rank + 1).

    Raises:
        ArgumentError: unknown metric name.
    """
    match = _METRIC.fullmatch(metric)
    if match is None:
        raise ArgumentError("metric", "hit_rate_K, ndcg_K or mrr", repr(metric))
    ranks = np.asarray(ranks)
    if metric == "mrr":
        return np.asarray(1.0 / (ranks + 1.0), dtype=np.float64)
    hit = ranks < int(match[2])
    if match[1] == "hit_rate":
        return hit.astype(np.float64)
    return np.asarray(hit / np.log2(ranks + 2.0), dtype=np.float64)


def metric_names(ks: Iterable[int], n_candidates: int) -> list[str]:
    """Names to report for cut-offs ``ks``.

    ``hit_rate_k`` is left out for k >= n_candidates, where it is 1 for every model.
    """
    names = []
    for k in ks:
        if k < n_candidates:
            names.append(f"hit_rate_{k}")
        names.append(f"ndcg_{k}")
    return [*names, "mrr"]


def bootstrap_ci(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` [users] over resampled users.

    Raises:
        ShapeError: ``values`` is empty or not one-dimensional.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ShapeError("values", "shape [users] with at least one", f"shape {list(values.shape)}")
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    n, share = len(values), counts / len(values)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(distinct))  # keeps the drawn counts under 32 MB
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = rng.multinomial(n, share, size=size) @ distinct / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`fastrec.train.evaluate`.

    Attributes:
        ranks: int64 [users], 0 = best; ties count against the positive.
        users: int64 [users], the dataset's user index of each row.
        protocol: "candidates", "full" or "sampled:N".
        n_candidates: size of the set each positive was ranked in.
        metrics: name -> mean over users. On n candidates ``hit_rate_k`` is absent for k >= n.
        ci95: name -> (low, high), bootstrap over users.
    """

    ranks: NDArray[np.int64]
    users: NDArray[np.int64]
    protocol: str
    n_candidates: int
    metrics: dict[str, float] = field(default_factory=dict)
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_ranks(
        cls,
        ranks: NDArray[np.int64],
        *,
        users: NDArray[np.int64] | None = None,
        protocol: str = "candidates",
        n_candidates: int,
        ks: Iterable[int] = (1, 5, 10, 50),
        seed: int = 0,
        intervals: bool = True,
    ) -> Evaluation:
        """Compute metrics from ranks.

        Args:
            ranks: int64 [users], 0 = best.
            users: int64 [users], the dataset's user indices; None numbers them from 0.
            protocol: for the record; see :func:`fastrec.train.evaluate`.
            n_candidates: size of the set each positive was ranked in.
            ks: cut-offs of hit rate and NDCG.
            seed: of the bootstrap.
            intervals: whether 95 % intervals are computed.

        Raises:
            ArgumentError: no users, or a rank outside 0..n_candidates - 1.
        """
        ranks = np.asarray(ranks, dtype=np.int64)
        if not len(ranks):
            raise ArgumentError("ranks", "at least one user", "none")
        if ranks.min() < 0 or ranks.max() >= n_candidates:
            raise ArgumentError("ranks", f"0..{n_candidates - 1}", f"{ranks.min()}..{ranks.max()}")
        values: dict[str, NDArray[np.float64]] = {
            name: gains(ranks, name) for name in metric_names(ks, n_candidates)
        }
        return cls(
            ranks=ranks,
            users=np.arange(len(ranks)) if users is None else np.asarray(users, dtype=np.int64),
            protocol=protocol,
            n_candidates=n_candidates,
            metrics={name: float(v.mean()) for name, v in values.items()},
            ci95={name: bootstrap_ci(v, seed=seed) for name, v in values.items() if intervals},
        )

    @property
    def n_users(self) -> int:
        """Users evaluated."""
        return len(self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, without the per-user arrays."""
        return {
            "protocol": self.protocol,
            "n_users": self.n_users,
            "n_candidates": self.n_candidates,
            "metrics": dict(self.metrics),
            "ci95": {name: list(interval) for name, interval in self.ci95.items()},
        }


def paired_difference(
    a: Evaluation, b: Evaluation, metric: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``a - b`` over the same users, with its 95 % interval: (difference, low, high).

    The users' own difficulty cancels, so the interval is much tighter than the two intervals apart.

    Args:
        a, b: evaluations of the same users on sets of the same size.
        metric: its name; see :func:`gains`.
        resamples: bootstrap resamples of the users.
        seed: of the resamples.

    Raises:
        ArgumentError: different users, protocols or candidate-set sizes.
    """
    _check_paired(a, b)
    difference = gains(a.ranks, metric) - gains(b.ranks, metric)
    low, high = bootstrap_ci(difference, resamples=resamples, seed=seed)
    return float(difference.mean()), low, high


def paired_ratio(
    a: Evaluation, b: Evaluation, metric: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float] | None:
    """Mean of ``a`` over mean of ``b`` on the same users, with its 95 % interval.

    Args: see :func:`paired_difference`.

    Returns:
        (ratio, low, high), from both means of the same resampled users; None where ``b`` scores
        nothing, so that there is no ratio.

    Raises:
        ArgumentError: different users, protocols or candidate-set sizes.
    """
    _check_paired(a, b)
    values = np.stack([gains(a.ranks, metric), gains(b.ranks, metric)], axis=1)
    mean = values.mean(axis=0)
    if not mean[1]:
        return None
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(values), counts / len(values), size=resamples
    )
    means = draws @ distinct
    # A resample in which b scores nothing says nothing of the ratio.
    means = means[means[:, 1] > 0]
    low, high = np.percentile(means[:, 0] / means[:, 1], [2.5, 97.5])
    return float(mean[0] / mean[1]), float(low), float(high)


def _check_paired(a: Evaluation, b: Evaluation) -> None:
    if (a.protocol, a.n_candidates) != (b.protocol, b.n_candidates):
        raise ArgumentError(
            "b", f"protocol {a.protocol} on {a.n_candidates}", f"{b.protocol} on {b.n_candidates}"
        )
    if not np.array_equal(a.users, b.users):
        raise ArgumentError("b", "the same users in the same order as a", "others")

"""Recommendation quality: the same users and candidates for every variant and engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrec.report.settings import CANDIDATES
from fastrec.train import Evaluation, evaluate, paired_difference

CANDIDATE_METRICS = ("hit_rate_1", "hit_rate_5", "hit_rate_10", "ndcg_10", "mrr")
CATALOGUE_METRICS = ("hit_rate_50", "ndcg_50")
SAMPLED = 1000
"""Candidates of the stand-in for the full catalogue where that is too large for the time."""
BATCH = 8
"""Users of a call."""
_MIN_USERS = 64


@dataclass(frozen=True)
class Catalogue:
    """The protocol of HR@50 and NDCG@50: one for all variants, else they could not be compared."""

    protocol: str
    users: int

    @property
    def note(self) -> str:
        """As printed."""
        if self.protocol == "full":
            return f"full catalogue ({self.users} users)"
        return (
            f"1 + {SAMPLED - 1} popularity-sampled candidates ({self.users} users): the catalogue "
            "is too large for the time given"
        )


def candidates_note(users: int) -> str:
    """As printed."""
    return f"1 + {CANDIDATES - 1} popularity-sampled candidates ({users} users)"


def choose_catalogue(engine: Any, dataset: Any, seconds: float, seed: int) -> Catalogue:
    """Choose how many users, over which candidates, fit into ``seconds`` on this engine.

    The full catalogue for as many users as the time allows, if that is at least 64; else
    ``sampled:1000``.
    """
    total = dataset.num_examples("test")
    probe = min(BATCH, total)
    start = time.perf_counter()
    evaluate(engine, dataset, protocol="candidates", limit=probe, seed=seed, batch_size=probe)
    per_score = (time.perf_counter() - start) / (probe * CANDIDATES)
    least = min(_MIN_USERS, total)
    users = int(seconds / (per_score * dataset.n_items))
    if users >= least or dataset.n_items <= SAMPLED:
        return Catalogue("full", min(total, max(users, least)))
    users = int(seconds / (per_score * SAMPLED))
    return Catalogue(f"sampled:{SAMPLED}", min(total, max(users, least)))


def measure(
    engine: Any,
    dataset: Any,
    *,
    users: int | None,
    catalogue: Catalogue | None,
    seed: int,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ranks of the users' held-out items: JSON types, so that a stage can keep them."""
    total = dataset.num_examples("test")
    limit = min(total, users or total)
    everyone = limit + (catalogue.users if catalogue else 0)

    def tell(offset: int) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(offset + done, everyone)

    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "intervals": False}
    near = evaluate(engine, dataset, protocol="candidates", limit=limit, on_batch=tell(0), **shared)
    found = {"candidates": _kept(near)}
    if catalogue is not None:
        far = evaluate(
            engine,
            dataset,
            protocol=catalogue.protocol,
            limit=catalogue.users,
            on_batch=tell(limit),
            **shared,
        )
        found["catalogue"] = _kept(far)
    return found


def _kept(found: Evaluation) -> dict[str, Any]:
    return {
        "protocol": found.protocol,
        "n_candidates": found.n_candidates,
        "ranks": found.ranks.tolist(),
        "users": found.users.tolist(),
    }


def _evaluation(kept: Mapping[str, Any], seed: int) -> Evaluation:
    ranks: NDArray[np.int64] = np.asarray(kept["ranks"], np.int64)
    return Evaluation.from_ranks(
        ranks,
        users=np.asarray(kept["users"], np.int64),
        protocol=kept["protocol"],
        n_candidates=kept["n_candidates"],
        seed=seed,
    )


def row_fields(
    found: Mapping[str, Any], baseline: Mapping[str, Any] | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Quality of a row: ``values``, ``ci95``, ``difference`` (to the baseline) and ``protocol``.

    A difference is taken over the same users and candidates only.
    """
    out: dict[str, dict[str, Any]] = {"values": {}, "ci95": {}, "difference": {}, "protocol": {}}
    for part, names in (("candidates", CANDIDATE_METRICS), ("catalogue", CATALOGUE_METRICS)):
        if part not in found:
            continue
        mine = _evaluation(found[part], seed)
        other = None
        if baseline is not None and baseline.get(part, {}).get("users") == found[part]["users"]:
            other = _evaluation(baseline[part], seed)
        users = mine.n_users
        note = candidates_note(users)
        if part == "catalogue":
            note = Catalogue(found[part]["protocol"], users).note
        for name in names:
            if name not in mine.metrics:
                continue  # as many candidates as the cut-off: 1 by construction
            out["values"][name] = mine.metrics[name]
            out["ci95"][name] = list(mine.ci95[name])
            out["protocol"][name] = note
            if other is not None:
                out["difference"][name] = list(paired_difference(mine, other, name, seed=seed))
    return out

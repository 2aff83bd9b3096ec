"""Full ranking of a SASRec: every held-out item among the whole catalogue."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.histories import Histories, Ids
from fastrec.models import SASRec
from fastrec.train import Evaluation, paired_ratio

KS = (1, 5, 10, 20, 50)


def rank(
    model: SASRec,
    data: Histories,
    split: str,
    *,
    users: Ids | None = None,
    exclude_seen: bool = True,
    intervals: bool = True,
) -> Evaluation:
    """Rank each user's target of ``split`` among all items.

    Args:
        users: whom to test; all by default.
        exclude_seen: leave out every item of the user's history (all of it, not only the newest
            ``max_length``); the target is always ranked.
        intervals: bootstrap the intervals too.

    Returns:
        An Evaluation in the order of ``users``. Ties and NaN count against the target.
    """
    users = data.users() if users is None else users
    ranks = np.empty(data.n_users, np.int64)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in data.held_out(split, users):
                state = model.last_state(
                    torch.from_numpy(batch.item), torch.from_numpy(batch.length)
                )
                scores = model.logits(state).float()
                target = torch.from_numpy(batch.target)[:, None]
                above = ~(scores < scores.gather(1, target))
                above[:, 0] = False
                above.scatter_(1, target, False)
                if exclude_seen:
                    _drop_seen(above, data, split, batch.user)
                ranks[batch.user] = above.sum(1).numpy()
    finally:
        model.train(training)
    return Evaluation.from_ranks(
        ranks[users],
        users=users,
        protocol="full",
        n_candidates=data.n_items - 1,
        ks=KS,
        intervals=intervals,
    )


def kept(variant: Evaluation, base: Evaluation, metric: str) -> dict[str, float] | None:
    """Share of ``base``'s metric that ``variant`` keeps, with its paired 95 % interval; None where
    there is nothing to keep."""
    found = paired_ratio(variant, base, metric)
    return None if found is None else dict(zip(("share", "low", "high"), found, strict=True))


def shown(share: dict[str, float] | None, digits: int = 3) -> str:
    """A kept share for people."""
    if share is None:
        return "-"
    return "{share:.{0}f} [{low:.{0}f}, {high:.{0}f}]".format(digits, **share)


def _drop_seen(above: Tensor, data: Histories, split: str, users: Ids) -> None:
    for row, user in enumerate(users):
        above[row, torch.from_numpy(data.history(int(user), split)[0])] = False

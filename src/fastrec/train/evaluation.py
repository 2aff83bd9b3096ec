"""Evaluation protocols: a set of candidates, or the whole catalogue.

"candidates" and "sampled:N" rank each user's held-out item among N - 1 sampled ones, "full" among
all items. The same model scores far higher on a sampled set: never compare across protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastrec.errors import ArgumentError, ShapeError
from fastrec.models import Ranker
from fastrec.train.metrics import Evaluation, ranks_from_scores

Score = Callable[[Tensor, Tensor], Tensor]  # candidate ids, categories [B, n] -> scores [B, n]
CANDIDATES = 50
FULL_CHUNK = 512  # candidates a call in the full protocol: bounds memory at [B, 512, tower]


def to_tensors(arrays: Iterable[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, ...]:
    """Numpy int64 arrays -> tensors on ``device``; copies only what numpy holds read-only."""
    return tuple(torch.from_numpy(a if a.flags.writeable else a.copy()).to(device) for a in arrays)


def latest(item: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The newest ``size`` events of left-aligned histories: (item [B, size], length [B])."""
    if item.shape[1] <= size:
        return item, length
    start = (length - size).clamp_min(0)
    index = start[:, None] + torch.arange(size, device=item.device)
    return item.gather(1, index), length.clamp_max(size)


def parse_protocol(protocol: str, n_candidates: int) -> int | None:
    """Size of the candidate set, or None for the full catalogue.

    Raises:
        ArgumentError: unknown protocol, or fewer than two candidates.
    """
    if protocol == "full":
        return None
    if protocol == "candidates":
        size = n_candidates
    elif protocol.startswith("sampled:") and protocol[8:].isdecimal():
        size = int(protocol[8:])
    else:
        raise ArgumentError("protocol", '"candidates", "full" or "sampled:N"', repr(protocol))
    if size < 2:
        raise ArgumentError("n_candidates", "two or more", size)
    return size


def default_candidates(dataset: Any) -> int:
    """Candidates of a user where no number is asked for: 50, or all of a smaller catalogue."""
    counts = getattr(dataset, "item_count", None)
    return CANDIDATES if counts is None else min(CANDIDATES, int(np.count_nonzero(counts)))


def _scorer(model: Any, history: tuple[Tensor, ...]) -> Score:
    """Bind a batch's history; models that can encode it once do so here."""
    item, category, behaviour, length = history
    if hasattr(model, "last_state"):  # SASRec: one state a user, scores by its item table
        state = model.last_state(*latest(item, length, model.config.max_length))
        catalogue = model.logits(state)
        return lambda cand_item, _: catalogue.gather(1, cand_item)
    if isinstance(model, Ranker):  # not any model with these methods: an engine's differ
        encoded = model.encode(item, category, behaviour, length)
        return lambda cand_item, cand_category: model.score(
            encoded, length, cand_item, cand_category
        )
    return lambda cand_item, cand_category: torch.as_tensor(
        model(item, category, behaviour, length, cand_item, cand_category)
    )


def _catalogue_ranks(
    score: Score, item: Tensor, target: Tensor, item_category: Tensor, exclude_seen: bool
) -> Tensor:
    """Rank of target int64 [B] among all real items, histories scored in chunks."""
    batch, n_items = len(target), len(item_category)
    positive = score(target[:, None], item_category[target][:, None]).float()
    above = torch.zeros(batch, dtype=torch.int64, device=item.device)
    counted = torch.ones(batch, n_items, dtype=torch.bool, device=item.device)
    if exclude_seen:
        counted.scatter_(1, item, False)
    counted.scatter_(1, target[:, None], False)
    for start in range(1, n_items, FULL_CHUNK):
        ids = torch.arange(start, min(start + FULL_CHUNK, n_items), device=item.device)
        scores = score(ids.expand(batch, -1), item_category[ids].expand(batch, -1)).float()
        above += (~(scores < positive) & counted[:, ids]).sum(1)
    return above


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode without gradients; each module's own training flag comes back afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        for module in modules[:1]:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def evaluate(
    model: Any,
    dataset: Any,
    *,
    protocol: str = "candidates",
    split: str = "test",
    n_candidates: int | None = None,
    negatives: str = "popularity",
    limit: int | None = None,
    seed: int = 0,
    ks: Iterable[int] = (1, 5, 10, 50),
    exclude_seen: bool = False,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
    intervals: bool = True,
) -> Evaluation:
    """Rank each user's held-out item.

    Args:
        model: a :class:`~fastrec.models.Ranker`, a :class:`~fastrec.models.SASRec`, or anything
            called with the six int64 tensors (an engine) that returns scores [B, m].
        dataset: a :class:`fastrec.data.SequenceDataset`, or an object with its methods.
        protocol: "candidates" (1 positive + ``n_candidates - 1`` sampled negatives), "sampled:N"
            (the same with N candidates), or "full" (every item of the catalogue). HitRate@50 means
            top-50 retrieval under "full"; on 50 candidates it is 1 by construction and left out.
        split: "valid" or "test".
        n_candidates: of the protocol "candidates"; by default 50, or all that can be drawn where
            the catalogue holds fewer.
        negatives: "popularity" or "uniform", how the negatives of a sampled protocol are drawn.
        limit: evaluate the first ``limit`` users only.
        seed: seed of negatives and bootstrap; the same seed gives every model the same candidates.
        ks: cut-offs.
        exclude_seen: leave items of the (stored) history out of the ranking; never the target.
        batch_size: users a call.
        autocast: run a torch model under autocast in this dtype.
        on_batch: called with the number of users done so far (progress).
        intervals: bootstrap the intervals too; False leaves ``ci95`` empty.

    Returns:
        An :class:`Evaluation`. Ties and NaN scores count against the positive.

    Raises:
        ArgumentError: unknown protocol, or the split has no users.
        ShapeError: the model returned scores of another shape than its candidates.
    """
    if n_candidates is None:
        n_candidates = default_candidates(dataset)
    size = parse_protocol(protocol, n_candidates)
    batches = dataset.batches(
        split,
        batch_size=batch_size,
        n_candidates=size or 1,
        negatives=negatives,
        seed=seed,
        shuffle=False,
        limit=limit,
        exclude_seen=exclude_seen,
    )
    ranks: list[NDArray[np.int64]] = []
    users: list[NDArray[np.int64]] = []
    done = 0
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    with evaluating(model):
        item_category = to_tensors([np.asarray(dataset.item_category, np.int64)], device)[0]
        context = torch.autocast(device.type, autocast) if autocast else nullcontext()
        with context:
            for batch in batches:
                *history, cand_item, cand_category = to_tensors(batch.inputs(), device)
                score = _scorer(model, tuple(history))
                label = to_tensors([batch.label], device)[0]
                if size is None:
                    target = cand_item.gather(1, label[:, None]).squeeze(1)
                    found = _catalogue_ranks(score, history[0], target, item_category, exclude_seen)
                    ranks.append(found.cpu().numpy())
                else:
                    scores = score(cand_item, cand_category)
                    if scores.shape != cand_item.shape:
                        raise ShapeError(
                            "model",
                            f"scores of shape {list(cand_item.shape)}",
                            f"shape {list(scores.shape)}",
                        )
                    ranks.append(ranks_from_scores(scores.float().cpu().numpy(), batch.label))
                users.append(np.asarray(batch.user, np.int64))
                done += len(batch.label)
                if on_batch is not None:
                    on_batch(done)
    if not ranks:
        raise ArgumentError("split", "a split with at least one user", repr(split))
    return Evaluation.from_ranks(
        np.concatenate(ranks),
        users=np.concatenate(users),
        protocol=protocol,
        n_candidates=size or len(item_category) - 1,
        ks=ks,
        seed=seed,
        intervals=intervals,
    )

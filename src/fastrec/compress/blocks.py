"""Blocks of a weight matrix: their scores, and the choice of those to prune.

Blocks start at (0, 0) and tile the matrix; those at the lower and right edge are cut off where the
matrix is no multiple of the block, and count by the elements that they really have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockScores:
    """Scores of one matrix's blocks: ``score`` f32 [ceil(N/bn), ceil(K/bk)] >= 0 (0 = already
    pruned) and ``count`` int64 of the same shape, the elements of each block."""

    score: Tensor
    count: Tensor

    @property
    def elements(self) -> int:
        return int(self.count.sum())


@dataclass(frozen=True)
class Selection:
    """Result of :func:`select`: ``keep`` bool masks shaped as the scores, the threshold theta
    (score of the weakest kept block), and the elements pruned."""

    keep: list[Tensor]
    threshold: float
    pruned_elements: int


def block_counts(shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Elements of each block, int64 [ceil(N/bn), ceil(K/bk)]."""

    def sizes(extent: int, step: int) -> Tensor:
        starts = torch.arange(0, extent, step)
        return (extent - starts).clamp(max=step)

    return sizes(shape[0], block[0])[:, None] * sizes(shape[1], block[1])[None, :]


def block_rms(weight: Tensor, block: tuple[int, int]) -> BlockScores:
    """Root mean square of each block of ``weight`` [N, K], over the elements that it really has."""
    n, k = weight.shape
    bn, bk = block
    squares = weight.detach().float().square()
    # first over the inputs of a block, then over its outputs
    squares = torch.nn.functional.pad(squares, (0, -k % bk)).view(n, -1, bk).sum(2)
    squares = torch.nn.functional.pad(squares, (0, 0, 0, -n % bn)).view(-1, bn, squares.shape[1])
    count = block_counts((n, k), block).to(weight.device)
    return BlockScores((squares.sum(1) / count).sqrt(), count)


def expand_mask(keep: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Block mask [ceil(N/bn), ceil(K/bk)] -> element mask [N, K]."""
    rows = keep.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]].contiguous()


def select(scores: Sequence[BlockScores], share: float, cap: float) -> Selection:
    """The paper's dynamic threshold over blocks: sort all scores at once and prune from below.

    Blocks are pruned in ascending order (ties: order of the matrices, then row-major) while their
    elements fit into ``share`` of all elements, so the share reached is below ``share`` by less
    than one block. No matrix loses more than ``cap`` of its elements: the strongest blocks of one
    that would are left out of the sort.

    Args:
        scores: one entry per matrix.
        share: in [0, 1), of all elements together.
        cap: in (0, 1], of each matrix alone.
    """
    values = [entry.score.flatten() for entry in scores]
    counts = [entry.count.flatten() for entry in scores]
    sizes = [len(count) for count in counts]
    limit = share * sum(entry.elements for entry in scores)
    limited: set[int] = set()
    while True:
        pruned = _weakest(torch.cat(values), torch.cat(counts), limit)
        parts = pruned.split(sizes)
        beyond = {
            i
            for i, (part, entry) in enumerate(zip(parts, scores, strict=True))
            if i not in limited and int(counts[i][part].sum()) > cap * entry.elements
        }
        if not beyond:
            break
        # The share they may not lose falls on the others, which may exceed the cap in turn.
        for i in beyond:
            allowed = _weakest(values[i], counts[i], cap * scores[i].elements)
            values[i] = torch.where(allowed, values[i], torch.inf)
        limited |= beyond
    kept = torch.cat(values)[~pruned]
    finite = kept[kept.isfinite()]
    theta = float(finite.min()) if len(finite) else float("inf")
    masks = [~part.view(entry.score.shape) for part, entry in zip(parts, scores, strict=True)]
    return Selection(masks, theta, int(torch.cat(counts)[pruned].sum()))


def _weakest(score: Tensor, count: Tensor, limit: float) -> Tensor:
    """bool mask of the blocks with the lowest finite scores whose elements add up to ``limit`` at
    most."""
    limit += 1e-6  # a share such as 0.4 is not exact in binary, and must still reach 40 of 100
    largest = int(count.max())
    if bool((count == largest).all()):
        # Blocks of one size (nearly every table and layer): a selection, ten times quicker than a
        # sort.
        n_pruned = min(int(limit / largest), int(score.isfinite().sum()))
        if n_pruned == 0:
            return torch.zeros_like(score, dtype=torch.bool)
        theta = score.kthvalue(n_pruned).values
        below = score < theta
        ties = score == theta
        return below | (ties & (ties.cumsum(0) <= n_pruned - below.sum()))
    order = torch.argsort(score, stable=True)
    fits = (count[order].cumsum(0) <= limit) & score[order].isfinite()
    pruned = torch.zeros_like(fits)
    pruned[order[: int(fits.sum())]] = True  # a prefix: the sums grow, infinite scores sort last
    return pruned

"""Weights that ``prune_`` masks: their scores, units, masks and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrec.compress.blocks import BlockScores, Selection, block_rms, expand_mask, select


@dataclass
class Matrix:
    """One weight to prune in blocks, under the name of the first module that holds it.

    A weight of groups [G, O, I] is seen as its rows of outputs [G * O, I].
    """

    name: str
    kind: str
    weight: nn.Parameter
    block: tuple[int, int]
    row_weight: Tensor | None = None
    unit: Tensor | float = 1.0
    mask: Tensor | None = None  # bool, the rows' shape
    pull: Tensor | None = None  # sums of squared gradients a block, since the last choice

    @property
    def rows(self) -> Tensor:
        """The weight as [outputs, inputs], detached; a copy where it is not contiguous."""
        return self.weight.detach().flatten(0, -2)

    def scores(self) -> BlockScores:
        """Score of each block, in the matrix's unit."""
        scores = self.raw_scores()
        return BlockScores(scores.score / self.unit, scores.count)

    def raw_scores(self) -> BlockScores:
        return block_rms(self._weighted(), self.block)

    def mask_of(self, keep: Tensor) -> Tensor:
        """Element mask [outputs, inputs] of the kept blocks."""
        return expand_mask(keep, tuple(self.rows.shape), self.block)

    def fix_unit(self, scale: str) -> None:
        """Measure scores in RMS of the non-zero weights of the same outputs (tables: of the whole
        table, where the rows' norms are what tells them apart). Once: with the RMS of what is left
        after each round, a layer pruned little would look weak beside one pruned much, and be cut
        to the cap."""
        weight = self._weighted().float()
        height = self.block[0] if self.kind == "linear" else len(weight)
        panels = weight.split(height)
        sums = torch.stack([panel.square().sum() for panel in panels])
        sizes = torch.stack([(panel != 0).sum() for panel in panels])
        unit = (sums / sizes.clamp_min(1)).sqrt()
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))[:, None]
        self.unit = unit.sqrt() if scale == "balanced" else unit

    def _weighted(self) -> Tensor:
        rows = self.rows
        return rows if self.row_weight is None else rows.float() * self.row_weight[:, None]

    def apply(self) -> None:
        if self.mask is not None:
            # not a product: a negative weight would become -0.0, which is not all zero bits
            self.weight.detach().masked_fill_(~self.mask.view(self.weight.shape), 0.0)

    def watch(self, gradient: Tensor) -> None:
        """Add a dense gradient to the blocks' sums of squared gradients."""
        scores = block_rms(gradient.flatten(0, -2), self.block)
        squares = scores.score.square() * scores.count
        self.pull = squares if self.pull is None else self.pull + squares


@dataclass
class NMMatrix(Matrix):
    """One weight of which ``keep`` of each ``block[1]`` neighbouring inputs stay.

    A "block" is such a group of inputs of one output; pruning it drops its smallest weights.
    """

    keep: int = 2

    def raw_scores(self) -> BlockScores:
        """RMS of the weights that a group would lose."""
        drops = self.block[1] - self.keep
        lost = self._groups().abs().sort(-1).values[..., :drops]
        score = lost.float().square().mean(-1).sqrt()
        return BlockScores(score, torch.full_like(score, drops, dtype=torch.int64))

    def mask_of(self, keep: Tensor) -> Tensor:
        order = self._groups().abs().argsort(dim=-1, descending=True, stable=True)
        strong = torch.zeros_like(order, dtype=torch.bool)
        strong.scatter_(-1, order[..., : self.keep], True)
        return (strong | keep[..., None]).flatten(-2)

    def _groups(self) -> Tensor:
        return self._weighted().unflatten(-1, (-1, self.block[1]))


def choose(
    group: Sequence[Matrix],
    *,
    share: float,
    goal: float,
    cap: float,
    by_layer: bool = False,
    regrow: float = 0.0,
) -> Selection:
    """Mask the weakest blocks of the group.

    Args:
        group: matrices of one kind.
        share: of what can be pruned, over the group (``by_layer``: of each matrix).
        goal: the share at the end: zeros that are there already, up to it, stay.
        cap: largest share that one matrix may lose.
        by_layer: a threshold for each matrix instead of one for all.
        regrow: share of what is kept that is given up in favour of pruned blocks whose gradients
            were the largest since the last choice.

    Returns:
        keep masks, the threshold (of several: the lowest), elements pruned.
    """
    sets = [[matrix] for matrix in group] if by_layer else [list(group)]
    parts = [_choose_together(matrices, share, goal, cap, regrow) for matrices in sets]
    selection = Selection(
        [mask for part in parts for mask in part.keep],
        min(part.threshold for part in parts),
        sum(part.pruned_elements for part in parts),
    )
    for matrix, keep in zip(group, selection.keep, strict=True):
        matrix.mask = matrix.mask_of(keep)
        matrix.apply()
        matrix.pull = None
    return selection


def _choose_together(
    group: Sequence[Matrix], share: float, goal: float, cap: float, regrow: float
) -> Selection:
    scores = [m.scores() for m in group]
    total = sum(s.elements for s in scores)
    # Zeros that are there already stay pruned through the early rounds of a repeated call.
    zero = sum(int(s.count[s.score == 0].sum()) for s in scores)
    share = min(max(share, zero / total), goal)
    pulls = [m.pull for m in group if m.pull is not None]
    if not regrow or len(pulls) < len(group):
        return select(scores, share, cap)
    chosen = select(scores, share + min(regrow * (1 - share), max(0.0, cap - share)), cap)
    counts = torch.cat([s.count.flatten() for s in scores])
    kept = torch.cat([keep.flatten() for keep in chosen.keep])
    # Mean square of a pruned block's gradients; the strongest come back until the share is met.
    pull = torch.cat([(p / s.count).flatten() for p, s in zip(pulls, scores, strict=True)])
    order = pull.masked_fill(kept, -torch.inf).argsort(descending=True, stable=True)
    order = order[: int((~kept).sum())]
    surplus = chosen.pruned_elements - share * total
    n_back = int((counts[order].cumsum(0) - counts[order] < surplus - 1e-6).sum())
    back = order[:n_back]
    kept[back] = True
    parts = kept.split([s.count.numel() for s in scores])
    keep = [part.view(s.count.shape) for part, s in zip(parts, scores, strict=True)]
    return Selection(keep, chosen.threshold, chosen.pruned_elements - int(counts[back].sum()))


@contextmanager
def masked_gradients(matrices: Sequence[Matrix], watch: bool) -> Iterator[None]:
    """Zero the gradients of pruned weights, so that no momentum builds up behind the mask.

    Args:
        watch: first record the squared gradients of the pruned blocks.
    """

    def hook_for(matrix: Matrix, mask: Tensor) -> Callable[[Tensor], Tensor]:
        dropped = ~mask.view(matrix.weight.shape)

        def hook(gradient: Tensor) -> Tensor:
            if watch:
                matrix.watch(gradient.to_dense())
            if gradient.is_sparse:
                return gradient * ~dropped
            return gradient.masked_fill(dropped, 0.0)

        return hook

    handles = [
        m.weight.register_hook(hook_for(m, m.mask))
        for m in matrices
        if m.mask is not None and m.weight.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

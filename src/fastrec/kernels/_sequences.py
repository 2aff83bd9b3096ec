"""A batch as its sequences, padded or jagged, for references."""

from __future__ import annotations

import itertools

import torch


def sequences(
    tensors: list[torch.Tensor], lengths: torch.Tensor | None, starts: torch.Tensor | None
) -> list[tuple[list[torch.Tensor], int]]:
    """[H, L, D] of each sequence, q and k first, and how many of its keys are valid."""
    if starts is not None:
        spans = itertools.pairwise(starts.tolist())
        return [([x[i:j].transpose(0, 1) for x in tensors], j - i) for i, j in spans]
    q, k, *_ = tensors
    keys = [k.shape[2]] * len(q) if lengths is None else lengths.tolist()
    return [([x[b] for x in tensors], valid) for b, valid in enumerate(keys)]

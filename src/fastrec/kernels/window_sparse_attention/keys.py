"""A batch as its sequences, and the keys that each row sees as positions, for references."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

# Rows worked on at once: bounds the memory to ROWS x keys x D for any L.
ROWS = 2048


def keys_of_rows(
    pattern: AttentionPattern, head: int, rows: torch.Tensor, length: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys that rows of a head see: positions int64 [R, n], in range, and bool [R, n] seen.

    Args:
        pattern, head: which keys each query sees.
        rows: int64 [R], positions.
        length, keys: of the sequence; its valid keys.
    """
    near = min(pattern.window, length)
    far = pattern.distances(length, head)
    steps = [*range(-near, near + 1), *far, *(-distance for distance in far)]
    steps = [step for step in steps if step <= 0 or not pattern.causal]
    key = rows[:, None] + torch.tensor(steps, device=rows.device)
    return key.clamp(0, max(keys - 1, 0)), (key >= 0) & (key < keys)


def blocks(
    pattern: AttentionPattern, rows: int, heads: int, keys: int, device: torch.device
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Head, rows, and :func:`keys_of_rows` of each block of one sequence.

    Args:
        pattern, heads, device: which keys each query sees.
        rows, keys: queries and valid keys.
    """
    for head in range(heads):
        for first in range(0, rows, ROWS):
            span = slice(first, min(first + ROWS, rows))
            numbers = torch.arange(span.start, span.stop, device=device)
            yield head, span, *keys_of_rows(pattern, head, numbers, max(rows, keys), keys)


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

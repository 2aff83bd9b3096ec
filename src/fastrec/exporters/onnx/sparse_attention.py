"""Window-sparse attention out of slices and matrix products: O(L * window) work and memory.

Queries lie in blocks of C = window rows; each block meets the block of keys before it, its own and
the one behind. Each far distance is a product of the queries with the keys moved by it. The length
stays free. Glossary: B batch, H heads, L length, D head width, N blocks, S keys around a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

# In place of scores that nobody may see: exp of it is 0.
_HIDDEN = -1e30


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Weights of what is seen; zeros in a row that sees nothing."""
    return scores.masked_fill(~seen, _HIDDEN).softmax(-1) * seen.to(scores.dtype)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, lengths: Tensor | None
) -> Tensor:
    """The attention of ``fastrec.kernels.window_sparse_attention``.

    Args:
        q: [B, H, L, D], scaled.
        k, v: [B, H, L, D].
        pattern: who sees whom.
        lengths: int64 [B], or None for all keys.

    Returns:
        [B, H, L, D].
    """
    length, heads = q.shape[2], q.shape[1]
    most = most_of(length)
    size = max(min(pattern.window, most - 1), 1)
    spans = 2 if pattern.causal else 3
    rows: Any
    if spans * size < most:
        blocks = (length + size - 1) // size
        rows, before, keys = blocks * size, size, spans * size
    else:  # the blocks around one would be the whole sequence
        rows, blocks, size, before, keys = length, 1, length, 0, length

    def around(x: Tensor) -> Tensor:
        """[B, H, L, D] -> [B, H, N, S, D]."""
        if not before:
            return x.unsqueeze(2)
        padded = F.pad(x, (0, 0, before, rows - length + size))
        parts = [
            padded[:, :, s * size : s * size + rows].unflatten(2, (blocks, size))
            for s in range(keys // size)
        ]
        return torch.cat(parts, 3)

    def moved(x: Tensor, step: int) -> Tensor:
        """Row i of the result is row i + step of x [B, H, L, D], or zeros."""
        padded = F.pad(x, (0, 0, max(-step, 0), rows - length + max(step, 0)))
        return padded[:, :, max(step, 0) : max(step, 0) + rows]

    place = torch.arange(rows, device=q.device)
    end = torch.full_like(place[:1], length) if lengths is None else lengths
    end = end[:, None, None, None]
    key = place.view(blocks, size)[:, :1, None] + torch.arange(keys, device=q.device) - before
    distance = place.view(blocks, size, 1) - key
    inside = (distance.abs() <= pattern.window) & (key >= 0)
    if pattern.causal:
        inside = inside & (distance >= 0)
    key = key.expand(blocks, size, keys).flatten(0, 1)
    seen = [inside.flatten(0, 1) & (key < end)]  # [B or 1, 1, rows, S]
    q = F.pad(q, (0, 0, 0, rows - length))
    near = q.unflatten(2, (blocks, size)) @ around(k).transpose(-1, -2)
    scores = [near.flatten(2, 3)]
    steps = _far_steps(pattern, most, heads)
    for step, by_head in steps.items():
        target = place[:, None] + step
        valid = (target >= 0) & (target < end)
        if not all(by_head):
            heads_of = [torch.full((1, 1), sees, dtype=torch.bool) for sees in by_head]
            valid = valid & torch.stack(heads_of)
        seen.append(valid)
        scores.append((q * moved(k, step)).sum(-1, keepdim=True))
    visible = torch.cat([s.expand(*q.shape[:3], s.shape[-1]) for s in seen], -1)
    weights = masked_softmax(torch.cat(scores, -1), visible)
    mixed = weights[..., :keys].unflatten(2, (blocks, size)) @ around(v)
    out = mixed.flatten(2, 3)
    for i, step in enumerate(steps):
        out = out + weights[..., keys + i : keys + i + 1] * moved(v, step)
    return out[:, :, :length]


def most_of(length: Any) -> int:
    """The largest value of a size that may be free."""
    if isinstance(length, int):
        return length
    return int(length.node.shape_env.bound_sympy(length.node.expr).upper)


def _far_steps(pattern: AttentionPattern, most: int, heads: int) -> dict[int, list[bool]]:
    """Signed far distances -> which heads see them."""
    lists = [pattern.distances(most, head) for head in range(heads)]
    far = sorted({d for distances in lists for d in distances})
    signs = (-1,) if pattern.causal else (-1, 1)
    return {sign * d: [d in distances for distances in lists] for d in far for sign in signs}

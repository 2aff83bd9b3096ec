"""The definition of ``window_sparse_attention`` in pure torch: each row with its list of keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

# Rows worked on at once: bounds the memory to ROWS x keys x D, whatever L is.
ROWS = 2048


def keys_of_rows(
    pattern: AttentionPattern, head: int, rows: torch.Tensor, length: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rows see: key numbers int64 [R, n], moved into range, and bool [R, n] valid."""
    near = min(pattern.window, length)
    far = pattern.distances(length, head)
    steps = [*range(-near, near + 1), *far, *(-distance for distance in far)]
    steps = [step for step in steps if step <= 0 or not pattern.causal]
    key = rows[:, None] + torch.tensor(steps, device=rows.device)
    return key.clamp(0, max(keys - 1, 0)), (key >= 0) & (key < keys)


def blocks(
    pattern: AttentionPattern, rows: int, heads: int, keys: int, device: torch.device
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Head, rows, and :func:`keys_of_rows` of each block of one sequence."""
    for head in range(heads):
        for first in range(0, rows, ROWS):
            span = slice(first, min(first + ROWS, rows))
            numbers = torch.arange(span.start, span.stop, device=device)
            yield head, span, *keys_of_rows(pattern, head, numbers, max(rows, keys), keys)


def one_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [H, L, D], k and v [H, valid keys, D] -> out [H, L, D], lse [H, L]."""
    heads, rows, _ = q.shape
    keys = k.shape[1]
    out: list[torch.Tensor] = []
    lse: list[torch.Tensor] = []
    if keys == 0 or rows == 0:
        return torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)
    for head, span, key, valid in blocks(pattern, rows, heads, keys, q.device):
        scores = torch.einsum("rd,rnd->rn", q[head, span], k[head][key]) * scale
        seen = valid.any(1, keepdim=True)
        # A row that sees nothing would turn into NaN: its scores count as 0, its result is cut out.
        scores = scores.masked_fill(~valid & seen, -torch.inf)
        sums = torch.einsum("rn,rnd->rd", scores.softmax(-1), v[head][key])
        out.append(sums.masked_fill(~seen, 0.0))
        lse.append(scores.logsumexp(-1).masked_fill(~seen[:, 0], -torch.inf))
    return torch.cat(out).reshape(q.shape), torch.cat(lse).reshape(q.shape[:2])


def window_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results of :func:`fastrec.kernels.window_sparse_attention`, in ``dtype``.

    Differentiable by torch's own autograd. The results keep ``dtype``: a test sees the error before
    it is rounded.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        valid = [q.shape[2]] * len(q) if lengths is None else lengths.tolist()
        parts = [(q[b], k[b, :, :n], v[b, :, :n]) for b, n in enumerate(valid)]
    else:
        sizes = cu_seqlens.diff().tolist()
        split = [x.transpose(0, 1).split(sizes, 1) for x in (q, k, v)]
        parts = list(zip(*split, strict=True))
    results = [
        one_sequence(q_s.to(dtype), k_s.to(dtype), v_s.to(dtype), pattern, scale)
        for q_s, k_s, v_s in parts
    ]
    if not q.numel():
        out, lse = q.to(dtype), q[..., 0].to(dtype)
    elif cu_seqlens is None:
        out, lse = (torch.stack(x) for x in zip(*results, strict=True))
    else:
        out, lse = (torch.cat(x, 1).transpose(0, 1) for x in zip(*results, strict=True))
    return (out, lse) if return_lse else out

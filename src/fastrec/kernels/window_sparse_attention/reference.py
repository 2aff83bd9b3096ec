"""The definition of ``window_sparse_attention`` in pure torch: each row with its list of keys."""

from __future__ import annotations

import torch

from fastrec.kernels.window_sparse_attention.keys import blocks
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern


def one_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence: out [H, L, D] and lse [H, L].

    Args:
        q, k, v: [H, L, D], k and v with valid keys alone.
        pattern, scale: as in the op.
    """
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

"""The definition of ``attention_map_kl`` in pure torch, and its gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch

from fastrec.kernels.window_sparse_attention.keys import blocks
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern


def divergence_and_gradients(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    student_q: torch.Tensor,
    student_k: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    teacher_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over valid rows [B, H] of KL(T || S), and d/dstudent_q, d/dstudent_k of each sum.

    Args: as of :func:`fastrec.kernels.attention_map_kl`.

    The sums are differentiable by torch's own autograd too, which the tests hold against the
    gradients that come with them.
    """
    batch, heads, length, dims = student_q.shape
    t_scale = teacher_q.shape[-1] ** -0.5 if teacher_scale is None else teacher_scale
    s_scale = dims**-0.5 if student_scale is None else student_scale
    sums = [student_q.new_zeros(()) for _ in range(batch * heads)]
    dq, dk = torch.zeros_like(student_q), torch.zeros_like(student_k)
    for b in range(batch):
        valid = length if lengths is None else int(lengths[b])
        if valid == 0:
            continue
        for head, rows, key, seen in blocks(pattern, valid, heads, valid, student_q.device):
            tq, sq = teacher_q[b, head, rows], student_q[b, head, rows]
            tk, sk = teacher_k[b, head, :valid][key], student_k[b, head, :valid][key]
            own = (torch.einsum("rd,rnd->rn", sq, sk) * s_scale).masked_fill(~seen, -torch.inf)
            row = torch.arange(rows.start, rows.stop, device=key.device)[:, None]
            taught = seen & (key <= row) if teacher_causal else seen
            target = torch.einsum("rd,rnd->rn", tq, tk) * t_scale
            log_s = own.log_softmax(-1)
            log_t = target.masked_fill(~taught, -torch.inf).log_softmax(-1)
            t = log_t.exp()
            # A key without weight in the teacher's map adds 0.
            difference = (log_t - log_s).masked_fill(~taught | (t == 0), 0.0)
            sums[b * heads + head] = sums[b * heads + head] + (t * difference).sum()
            slope = (s_scale * (log_s.exp() - t)).detach()
            dq[b, head, rows] = torch.einsum("rn,rnd->rd", slope, sk).detach()
            shares = (slope[..., None] * sq[:, None]).detach()
            dk[b, head].index_add_(0, key.flatten(), shares.flatten(0, 1))
    total = torch.stack(sums) if sums else student_q.new_zeros(0)
    return total.reshape(batch, heads), dq, dk


def reduce(sums: torch.Tensor, rows: torch.Tensor | int, reduction: str) -> torch.Tensor:
    """[B, H] sums over ``rows`` rows of all sequences together -> what ``reduction`` names."""
    if reduction == "none":
        return sums
    if reduction == "sum":
        return sums.sum()
    count = rows * sums.shape[1]
    count = count.clamp_min(1) if isinstance(count, torch.Tensor) else max(count, 1)
    return sums.sum() / count


def attention_map_kl_reference(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    student_q: torch.Tensor,
    student_k: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> torch.Tensor:
    """Arguments and result of :func:`fastrec.kernels.attention_map_kl`, in ``dtype``."""
    tq, tk, sq, sk = (x.to(dtype) for x in (teacher_q, teacher_k, student_q, student_k))
    sums, _, _ = divergence_and_gradients(tq, tk, sq, sk, pattern, lengths=lengths, **kwargs)
    batch, _, length, _ = student_q.shape
    rows = batch * length if lengths is None else lengths.sum()
    return reduce(sums, rows, reduction)

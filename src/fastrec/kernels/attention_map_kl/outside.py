"""How much of the teacher's attention the student's pattern cannot see."""

from __future__ import annotations

import torch

from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.kernels.window_sparse_attention.reference import keys_of_rows

# Scores held at once: 64 MB of fp32.
_SCORES = 1 << 24


@torch.no_grad()
def teacher_mass_outside(
    teacher_q: torch.Tensor,
    teacher_k: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Mean over valid rows of the dense teacher's probability outside ``pattern``, in [0, 1].

    What ``attention_map_kl`` leaves out by restricting the teacher. Dense: O(L^2 D) time, but a few
    rows at a time, so never an L x L buffer.

    Args:
        teacher_q, teacher_k: [B, H, L, D].
        lengths: int64 [B]; rows and keys at or beyond it do not count.
        scale: None means D ** -0.5.
        causal: whether the teacher sees no later key.

    Returns:
        float32 [B, H] (float64 for float64); 0 for an empty sequence.
    """
    batch, heads, length, dims = teacher_q.shape
    scale = dims**-0.5 if scale is None else scale
    dtype = torch.float64 if teacher_q.dtype is torch.float64 else torch.float32
    mass = torch.zeros(batch, heads, dtype=dtype, device=teacher_q.device)
    for b in range(batch):
        valid = length if lengths is None else int(lengths[b])
        step = max(1, _SCORES // max(valid, 1))
        for head in range(heads):
            key = teacher_k[b, head, :valid].to(dtype)
            for first in range(0, valid, step):
                row = torch.arange(first, min(first + step, valid), device=key.device)
                scores = teacher_q[b, head, row].to(dtype) @ key.T * scale  # [R, valid]
                if causal:
                    later = torch.arange(valid, device=key.device) > row[:, None]
                    scores = scores.masked_fill(later, -torch.inf)
                shares = scores.softmax(-1)
                near, seen = keys_of_rows(pattern, head, row, valid, valid)
                inside = (shares.gather(1, near) * seen).sum(1)
                mass[b, head] += (1 - inside).clamp_min(0).sum() / valid
    return mass

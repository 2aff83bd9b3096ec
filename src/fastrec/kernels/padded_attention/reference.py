"""The definition of ``padded_attention`` in pure torch."""

from __future__ import annotations

import torch


def padded_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> torch.Tensor:
    """Same arguments and result as :func:`fastrec.kernels.padded_attention`, computed in ``dtype``.

    Keys beyond the length are cut away, not masked, so that their values, NaNs included, play no
    part.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=q.dtype)
    for b in range(len(q)):
        keys = k.shape[2] if lengths is None else int(lengths[b])
        if keys:
            scores = q[b].to(dtype) @ k[b, :, :keys].to(dtype).transpose(-1, -2) * scale
            out[b] = (scores.softmax(-1) @ v[b, :, :keys].to(dtype)).to(q.dtype)
    return out

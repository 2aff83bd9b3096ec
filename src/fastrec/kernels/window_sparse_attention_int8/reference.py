"""The definition of ``window_sparse_attention_int8`` in pure torch."""

from __future__ import annotations

import math

import torch

from fastrec.kernels.window_sparse_attention.keys import blocks, sequences
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

# 255 * 2^f = 255 + f * (C1 + f * (C2 + f * C3)) within 1.02e-4 of itself on |f| <= 1/2: a minimax
# fit with the value at 0 held, so that the largest score weighs exactly 255.
C1, C2, C3 = 176.78713989257812, 61.7637939453125, 14.027276992797852
LOWEST = -16.0  # 255 * 2^-16 rounds to 0


def exponent_scale_of(q_scale: float, k_scale: float, scale: float) -> float:
    """From integer scores to exponents of 2."""
    return q_scale * k_scale * scale * math.log2(math.e)


def quantise_values(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., L, D] -> int8 and float32 scales [...]: the largest |v| becomes 127."""
    largest = v.abs().amax((-2, -1)) if v.numel() else v.new_zeros(v.shape[:-2])
    inverse = torch.tensor(127.0) / largest
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    return torch.round(v * inverse[..., None, None]).to(torch.int8), largest / 127.0


def weights_of(scores: torch.Tensor, seen: torch.Tensor, exponent_scale: float) -> torch.Tensor:
    """int64 scores [..., L, K] and what is seen -> weights 0..255 (int64), 255 the largest."""
    highest = scores.masked_fill(~seen, -(2**29)).amax(-1, keepdim=True)
    # The exact difference is below 2^24, so that float32 holds it.
    t = (scores - highest).float() * torch.tensor(exponent_scale, dtype=torch.float32)
    t = t.clamp_min(LOWEST)
    n = torch.round(t)
    f = t - n
    p = 255.0 + f * (C1 + f * (C2 + f * C3))
    power_of_two = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(seen, torch.round(p * power_of_two).long(), 0)


def window_sparse_attention_int8_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    q_scale: float,
    k_scale: float,
    q_zero_point: int | None = None,
    v_scale: float | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
) -> torch.Tensor:
    """Same arguments and result as :func:`fastrec.kernels.window_sparse_attention_int8`.

    Integer products are taken in float64, whose 53 bits hold them.
    """
    heads, dims = q.shape[1], q.shape[-1]
    scale = dims**-0.5 if scale is None else scale
    exponent_scale = exponent_scale_of(q_scale, k_scale, scale)
    zero_point = (128 if q_zero_point is None else q_zero_point) if q.dtype == torch.uint8 else 0
    result = torch.zeros(q.shape)
    for b, (one, keys) in enumerate(sequences([q, k, v, result], lengths, cu_seqlens)):
        if keys == 0:
            continue
        values, to = one[2][:, :keys], one[3]
        if values.dtype == torch.uint8:
            values = values.to(torch.int16) - 128
        if values.dtype == torch.float32:
            values, value_scale = quantise_values(values)
        elif isinstance(v_scale, torch.Tensor):
            value_scale = v_scale[b]
        else:
            value_scale = torch.full((heads,), float(v_scale or 0.0))
        query, key, value = (x.double() for x in (one[0], one[1][:, :keys], values))
        if k.dtype == torch.uint8:
            key = key - 128
        for head, rows, seen_key, seen in blocks(pattern, to.shape[1], heads, keys, q.device):
            chosen = key[head][seen_key]
            scores = torch.einsum("rd,rnd->rn", query[head, rows] - zero_point, chosen).long()
            weights = weights_of(scores, seen, exponent_scale)
            exact = torch.einsum("rn,rnd->rd", weights.double(), value[head][seen_key])
            total = weights.sum(-1)
            factor = torch.where(total > 0, value_scale[head] / total.float(), 0.0)
            to[head, rows] = exact.float() * factor[:, None]
    if out is None:
        return result
    assert out_scale is not None
    assert out_zero_point is not None
    inverse = torch.tensor(1.0) / torch.tensor(out_scale, dtype=torch.float32)
    clipped = (result * inverse).clamp(-out_zero_point, 255 - out_zero_point)
    return (torch.round(clipped) + out_zero_point).to(torch.uint8)

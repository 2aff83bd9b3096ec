"""The definition of ``pointwise_attention_int8`` in pure torch: every step one fp32 operation.

The order of the steps is that of ``csrc/cpu/pointwise_attention_int8/pointwise_attention_int8.h``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastrec.kernels.pointwise_attention.buckets import buckets_of
from fastrec.kernels.pointwise_attention.reference import (
    entries_of,
    rows_of,
    seen_pairs,
    spans_of,
)

RUN = 64
SMALLEST = 2.0**-100
MINUS_LOG2_E = -1.44269504088896341
# 2^r, |r| <= 1/2, by falling powers of r.
POWER = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
         2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e^-x), float32, in the op's steps."""
    p = (x * MINUS_LOG2_E).clamp(-126.0, 126.0)
    n = p.round()
    r = p - n
    e = torch.full_like(x, POWER[0])
    for coefficient in POWER[1:]:
        e = e * r
        e = e + coefficient
    e = torch.ldexp(e, n.to(torch.int32))
    return x * (1.0 / (1.0 + e))


def add_run(out: torch.Tensor, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """out [H, L, Dv] plus a run: weights [H, L, n] float32, v [H, n, Dv] int8."""
    largest = weights.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    # One division: `127.0 / largest` is torch's reciprocal, then a product.
    rounded = (weights * (torch.full_like(largest, 127.0) / largest)).round()
    # Integers below 2^20: exact in double.
    totals = (rounded.double() @ v.double()).float()
    return out + totals * (largest / 127.0)


def pointwise_attention_int8_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_scale: float,
    k_scale: float,
    v_scale: float,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    time_edges: torch.Tensor | None = None,
    timestamps: torch.Tensor | None = None,
    query_timestamps: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    targets: torch.Tensor | int | None = None,
    scale: float | None = None,
    norm_length: float | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Arguments and result of :func:`fastrec.kernels.pointwise_attention_int8`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    norm = max(q.shape[-2], 1) if norm_length is None else norm_length
    score_scale = torch.tensor(q_scale * k_scale * scale, dtype=torch.float32)
    spans, results = spans_of(q, lengths, cu_seqlens), []
    own = targets.tolist() if isinstance(targets, torch.Tensor) else [targets or 0] * len(spans)
    for span, candidates in zip(spans, own, strict=True):
        rows, history = span[2], span[2] - candidates
        q_s, k_s, v_s = (rows_of(x, span) for x in (q, k, v))
        x = (q_s.double() @ k_s.double().mT).float() * score_scale
        if position_bias is not None:
            x = x + position_bias[..., entries_of(rows, position_bias.shape[-1], q.device)]
        if time_bias is not None and timestamps is not None and time_edges is not None:
            asked = timestamps if query_timestamps is None else query_timestamps
            buckets = buckets_of(rows_of(asked, span), rows_of(timestamps, span), time_edges)
            x = x + time_bias[..., buckets]
        weights = silu(x).masked_fill(~seen_pairs(rows, history, causal, q.device), 0.0)
        out = torch.zeros(*v_s.shape[:2], v.shape[-1])
        for begin in range(0, history, RUN):
            run = slice(begin, min(begin + RUN, history))
            out = add_run(out, weights[..., run], v_s[:, run])
        for i in range(history, rows):
            out[:, i : i + 1] = add_run(
                out[:, i : i + 1], weights[:, i : i + 1, i : i + 1], v_s[:, i : i + 1]
            )
        out = out * torch.tensor(v_scale / norm, dtype=torch.float32)
        behind = 0 if q.dim() == 3 else q.shape[2] - rows
        results.append(out.transpose(0, 1) if q.dim() == 3 else F.pad(out, (0, 0, 0, behind)))
    if not results:
        return v.float()
    return torch.cat(results) if q.dim() == 3 else torch.stack(results)

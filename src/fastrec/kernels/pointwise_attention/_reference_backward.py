"""The gradients of ``pointwise_attention`` in closed form, for the op's reference backend.

Beneath the dispatcher, where a torch op runs, autograd records nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from fastrec.kernels.pointwise_attention.reference import entries_of, rows_of, scores_of_sequences


def _by_entry(table: torch.Tensor, entries: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Gradients [H, rows, rows] of scores, summed by the entry that each pair took."""
    heads = len(grads)
    sums = grads.new_zeros(heads, table.shape[-1])
    sums.index_add_(1, entries.flatten(), grads.reshape(heads, -1))
    return sums if table.dim() == 2 else sums.sum(0)


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    norm_length: float | None,
    **options: Any,
) -> tuple[Any, ...]:
    """dq, dk, dv and those of the tables, or None where there is none."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    q, k, v, d_out = (x.to(dtype) for x in (q, k, v, d_out))
    norm = q.shape[-2] if norm_length is None else norm_length
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    position, time = options["position_bias"], options["time_bias"]
    d_position, d_time = (None if x is None else torch.zeros_like(x) for x in (position, time))
    for span, scores, seen, buckets in scores_of_sequences(q, k, **options):
        sigmoid = scores.sigmoid()
        weights = (scores * sigmoid / norm).masked_fill(~seen, 0.0)
        slopes = sigmoid * (1 + scores * (1 - sigmoid)) / norm
        own = rows_of(d_out, span)
        grads = (slopes * (own @ rows_of(v, span).mT)).masked_fill(~seen, 0.0)
        rows_of(dq, span).copy_(grads @ rows_of(k, span) * options["scale"])
        rows_of(dk, span).copy_(grads.mT @ rows_of(q, span) * options["scale"])
        rows_of(dv, span).copy_(weights.mT @ own)
        if d_position is not None:
            entries = entries_of(span[2], position.shape[-1], q.device)
            d_position += _by_entry(position, entries, grads)
        if d_time is not None:
            assert buckets is not None
            d_time += _by_entry(time, buckets, grads)
    return dq, dk, dv, d_position, d_time

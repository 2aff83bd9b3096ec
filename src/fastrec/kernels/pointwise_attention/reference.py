"""The definition of ``pointwise_attention`` in pure torch: one sequence after the other, dense."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastrec.kernels.pointwise_attention.buckets import buckets_of


def seen_pairs(rows: int, history: int, causal: bool, device: torch.device) -> torch.Tensor:
    """bool [rows, rows]: whether row i sees row j, itself or an (earlier) one of the history."""
    j = torch.arange(rows, device=device)
    i = j[:, None]
    return (i == j) | ((j < history) & ((j < i) | (not causal)))


def entries_of(rows: int, size: int, device: torch.device) -> torch.Tensor:
    """int64 [rows, rows]: the entry of a position table of that size for row i and key j."""
    last, j = size // 2, torch.arange(rows, device=device)
    return last + (j - j[:, None]).clamp(-last, last)


def spans_of(
    q: torch.Tensor, lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> list[tuple[int, int, int]]:
    """Batch (0 where jagged), first row and number of rows of each sequence."""
    if cu_seqlens is not None:
        sizes = cu_seqlens.diff().tolist()
        return [(0, first, n) for first, n in zip(cu_seqlens.tolist(), sizes, strict=False)]
    sizes = [q.shape[2]] * len(q) if lengths is None else lengths.tolist()
    return [(b, 0, n) for b, n in enumerate(sizes)]


def rows_of(x: torch.Tensor, span: tuple[int, int, int]) -> torch.Tensor:
    """A sequence's [H, rows, D] of [B, H, L, D] or [T, H, D]; [rows] of [B, L] or [T]."""
    b, first, rows = span
    if x.dim() == 4:
        return x[b, :, first : first + rows]
    own = (x[b] if x.dim() == 2 else x)[first : first + rows]
    return own.transpose(0, 1) if x.dim() == 3 else own


def scores_of_sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    time_edges: torch.Tensor | None = None,
    timestamps: torch.Tensor | None = None,
    query_timestamps: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    targets: torch.Tensor | int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Iterator[tuple[tuple[int, int, int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Span, scores [H, rows, rows], which are seen [rows, rows] and the time buckets, of each."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spans = spans_of(q, lengths, cu_seqlens)
    own = targets.tolist() if isinstance(targets, torch.Tensor) else [targets or 0] * len(spans)
    for span, candidates in zip(spans, own, strict=True):
        rows, buckets = span[2], None
        scores = rows_of(q, span) @ rows_of(k, span).mT * scale
        if position_bias is not None:
            entries = entries_of(rows, position_bias.shape[-1], q.device)
            scores = scores + position_bias[..., entries].to(scores.dtype)
        if time_bias is not None:
            assert timestamps is not None and time_edges is not None  # noqa: PT018
            asked = timestamps if query_timestamps is None else query_timestamps
            buckets = buckets_of(rows_of(asked, span), rows_of(timestamps, span), time_edges)
            scores = scores + time_bias[..., buckets].to(scores.dtype)
        yield span, scores, seen_pairs(rows, rows - candidates, causal, q.device), buckets


def pointwise_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    norm_length: float | None = None,
    dtype: torch.dtype = torch.float64,
    **options: torch.Tensor | float | bool | None,
) -> torch.Tensor:
    """Arguments and result of :func:`fastrec.kernels.pointwise_attention`, in ``dtype``.

    Differentiable by torch's own autograd. The result keeps ``dtype``: a test sees the error before
    it is rounded.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    norm = q.shape[-2] if norm_length is None else norm_length
    out = []
    for span, scores, seen, _ in scores_of_sequences(q, k, **options):  # type: ignore[arg-type]
        result = (F.silu(scores) / norm).masked_fill(~seen, 0.0) @ rows_of(v, span)
        # Rows behind a padded sequence are zeros.
        behind = 0 if q.dim() == 3 else q.shape[2] - span[2]
        out.append(result.transpose(0, 1) if q.dim() == 3 else F.pad(result, (0, 0, 0, behind)))
    return v if not out else torch.cat(out) if q.dim() == 3 else torch.stack(out)

"""Calls into the compiled kernels: patterns resolved once, tensors as addresses and strides."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels import _compiled
from fastrec.kernels.window_sparse_attention._spec import decode

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOTHING = (0, 0, 0, 0)


@functools.lru_cache(maxsize=4096)
def _pattern(window: int, offsets: str, causal: bool, heads: int, length: int) -> Any:
    """The compiled pattern. Distances that a shorter sequence lacks reach none of its keys, so one
    made for the longest serves all."""
    pattern = decode(window, offsets, causal)
    lists = [pattern.distances(length, h) for h in range(heads if pattern.per_head else 1)]
    # Nothing lies further away than the sequence is long, and sums of positions stay in range.
    near = min(window, length)
    return _compiled.native().window_sparse_attention.Pattern(near, causal, lists)


def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and strides of batch, head and row; [B, H, L, ...] or jagged [T, H, ...]."""
    if x.dim() == 4:
        batch, head, row, _ = x.stride()
        return x.data_ptr(), batch, head, row
    row, head, _ = x.stride()
    return x.data_ptr(), 0, head, row


def _scalar_view(x: torch.Tensor) -> tuple[int, int, int, int]:
    if x.dim() == 3:
        return x.data_ptr(), *x.stride()
    row, head = x.stride()
    return x.data_ptr(), 0, head, row


def _shape(
    q: torch.Tensor, lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[int, int, int, int, int, int, int]:
    dtype = DTYPES[q.dtype]
    if cu_seqlens is not None:
        rows, heads, dims = q.shape
        return dtype, len(cu_seqlens) - 1, heads, rows, dims, 0, cu_seqlens.data_ptr()
    batch, heads, rows, dims = q.shape
    return dtype, batch, heads, rows, dims, 0 if lengths is None else lengths.data_ptr(), 0


def empty_like_rows(x: torch.Tensor) -> torch.Tensor:
    """An output for q, k or v: a view of contiguous [B, L, H, D], or contiguous [T, H, D]."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    batch, heads, rows, dims = x.shape
    # Half the time of new_empty and transpose.
    strides = (rows * heads * dims, dims, heads * dims, 1)
    return torch.empty_strided((batch, heads, rows, dims), strides, dtype=x.dtype, device=x.device)


def bad_entry(
    bad: int, q: torch.Tensor, lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> ArgumentError:
    """The error for an entry of ``lengths`` or ``cu_seqlens`` that is out of order."""
    if cu_seqlens is not None:
        expected = f"values rising from 0 to T = {len(q)}"
        return ArgumentError("cu_seqlens", expected, f"{int(cu_seqlens[bad])} at {bad}")
    assert lengths is not None
    return ArgumentError("lengths", f"values in [0, {q.shape[2]}]", int(lengths[bad]))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    offsets: str,
    causal: bool,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checked arguments; ``lengths`` and ``cu_seqlens`` are contiguous int64."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    shape = _shape(q, lengths, cu_seqlens)
    out = empty_like_rows(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if with_lse else None
    bad = _pattern(window, offsets, causal, shape[2], shape[3]).forward(
        scale,
        shape,
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        _NOTHING if lse is None else _scalar_view(lse),
    )
    if bad >= 0:
        raise bad_entry(bad, q, lengths, cu_seqlens)
    return out, lse


def backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    offsets: str,
    causal: bool,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv; recomputes the weights from lse."""
    q, k, v, out, d_out = (_readable(x) for x in (q, k, v, out, d_out))
    shape = _shape(q, lengths, cu_seqlens)
    dq, dk, dv = empty_like_rows(q), empty_like_rows(k), empty_like_rows(v)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    bad = _pattern(window, offsets, causal, shape[2], shape[3]).backward(
        scale,
        shape,
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        _scalar_view(lse),
        _view(d_out),
        _NOTHING if d_lse is None else _scalar_view(d_lse),
        _view(dq),
        _view(dk),
        _view(dv),
        _scalar_view(delta),
    )
    if bad >= 0:
        raise bad_entry(bad, q, lengths, cu_seqlens)
    return dq, dk, dv

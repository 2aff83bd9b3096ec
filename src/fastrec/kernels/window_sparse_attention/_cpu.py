"""Calls into the compiled kernels: patterns resolved once, tensors as addresses and strides."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import length_error, start_error
from fastrec.kernels._views import row_view
from fastrec.kernels.window_sparse_attention._spec import Call, Rows, decode

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOTHING = (0, 0, 0, 0)


@functools.lru_cache(maxsize=4096)
def _pattern(window: int, offsets: str, causal: bool, heads: int, length: int) -> Any:
    """The compiled pattern. A distance beyond a sequence reaches no key of it, so the pattern of
    the longest sequence serves all."""
    pattern = decode(window, offsets, causal)
    lists = [pattern.distances(length, h) for h in range(heads if pattern.per_head else 1)]
    # Nothing lies further away than the sequence is long, and sums of positions stay in range.
    near = min(window, length)
    return _compiled.native().window_sparse_attention.Pattern(near, causal, lists)


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


def _entry_error(
    bad: int, q: torch.Tensor, lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> ArgumentError:
    if cu_seqlens is not None:
        return start_error(cu_seqlens, bad, len(q))
    return length_error(lengths, bad, q.shape[2])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result and, where it is wanted, the log-sum-exp of each row.

    Args:
        q, k, v, with_lse: as in the op.
        call: checked.

    Raises:
        ArgumentError: an entry of lengths or cu_seqlens is out of order.
    """
    window, offsets, causal, lengths, cu_seqlens, scale = call
    shape = _shape(q, lengths, cu_seqlens)
    (q, q_rows), (k, k_rows), (v, v_rows) = row_view(q), row_view(k), row_view(v)
    out = empty_like_rows(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if with_lse else None
    bad = _pattern(window, offsets, causal, shape[2], shape[3]).forward(
        scale,
        shape,
        q_rows,
        k_rows,
        v_rows,
        row_view(out)[1],
        _NOTHING if lse is None else _scalar_view(lse),
    )
    if bad >= 0:
        raise _entry_error(bad, q, lengths, cu_seqlens)
    return out, lse


def backward(rows: Rows, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv; recomputes the weights from lse.

    Raises:
        ArgumentError: an entry of lengths or cu_seqlens is out of order.
    """
    d_out, d_lse, q, k, v, out, lse = rows
    window, offsets, causal, lengths, cu_seqlens, scale = call
    shape = _shape(q, lengths, cu_seqlens)
    # The tensors are held until the kernel is done with their addresses.
    tensors, inputs = zip(*(row_view(x) for x in (q, k, v, out, d_out)), strict=True)
    q, k, v, *_ = tensors
    dq, dk, dv = empty_like_rows(q), empty_like_rows(k), empty_like_rows(v)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    bad = _pattern(window, offsets, causal, shape[2], shape[3]).backward(
        scale,
        shape,
        *inputs[:4],
        _scalar_view(lse),
        inputs[4],
        _NOTHING if d_lse is None else _scalar_view(d_lse),
        *(row_view(x)[1] for x in (dq, dk, dv)),
        _scalar_view(delta),
    )
    if bad >= 0:
        raise _entry_error(bad, q, lengths, cu_seqlens)
    return dq, dk, dv

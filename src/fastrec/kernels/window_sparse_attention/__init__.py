"""``window_sparse_attention``: softmax attention over a window and a few far positions.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]   over the keys j that the pattern shows to i

O(L (w + log L) D) instead of O(L^2 D), forward and backward, in O(L) memory. Source: the paper's
local + sparse attention.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels._checks import check_lengths, check_scale, check_starts
from fastrec.kernels._registry import OpSpec
from fastrec.kernels._torch_op import FLOAT_NAMES
from fastrec.kernels.dlpack import takes_arrays
from fastrec.kernels.window_sparse_attention import _torch_op
from fastrec.kernels.window_sparse_attention._spec import encode, encode_cached
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.kernels.window_sparse_attention.reference import window_sparse_attention_reference
from fastrec.kernels.window_sparse_attention.samples import compare, samples

__all__ = ["SPEC", "AttentionPattern", "window_sparse_attention"]

MAX_DIMS = 256
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, jagged: bool
) -> None:
    rank, layout = (3, "[T, H, D]") if jagged else (4, "[B, H, L, D]")
    shape = q.shape
    if len(shape) != rank:
        raise ShapeError("q", f"shape {layout}", list(shape))
    if q.dtype not in FLOAT_NAMES:
        raise DtypeError("q", "float32, bfloat16, float16 or float64", q.dtype)
    for name, x in (("k", k), ("v", v)):
        if x.shape != shape:
            raise ShapeError(name, f"q's shape {list(shape)}", list(x.shape))
        if x.dtype != q.dtype:
            raise DtypeError(name, f"q's dtype {q.dtype}", x.dtype)
        if x.device != q.device:
            raise DeviceError(name, f"q's device {q.device}", x.device)
    heads, dims = shape[1], shape[-1]
    if heads == 0 or not 1 <= dims <= MAX_DIMS:
        raise ShapeError("q", f"at least one head and 1 to {MAX_DIMS} dimensions", list(shape))
    if not isinstance(pattern, AttentionPattern):
        raise DtypeError("pattern", "an AttentionPattern", type(pattern).__name__)
    if pattern.per_head and pattern.heads not in (None, heads):
        raise ShapeError("pattern", f"offsets for q's {heads} heads", f"{pattern.heads} lists")


@overload
def window_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def window_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@takes_arrays
def window_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention in which row i sees the keys that ``pattern`` shows it.

    Args:
        q, k, v: [B, H, L, D], or jagged [T, H, D] with ``cu_seqlens``; one dtype of float32,
            bfloat16, float16 (all computed in float32) or float64 (reference only); D from 1 to
            256. Any strides: views of a merged projection are read in place if D is contiguous.
        pattern: which keys each query sees; in a jagged batch each sequence on its own.
        lengths: int64 [B], 0 to L: keys from there on are never read, NaNs included. Rows beyond
            the length are queries like any other; one that sees no valid key returns 0.
        cu_seqlens: int64 or int32 [B + 1], rising from 0 to T: sequence b is rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Excludes ``lengths``. On a GPU the values of
            both are not waited for: what is out of range is moved into it, and no error raised.
        scale: factor of the scores; None means D ** -0.5.
        return_lse: also return each row's log-sum-exp of its scores, -inf where it sees none.
        backend: None picks the best once per signature; "cpu", "triton" or "reference" forces one.

    Returns:
        q's shape and dtype, a view of contiguous [B, L, H, D] (or contiguous [T, H, D]); with
        ``return_lse`` also float32 [B, H, L] or [T, H] (float64 for float64). Both differentiable
        once with respect to q, k and v; the gradients are the same for any number of threads.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    _check(q, k, v, pattern, cu_seqlens is not None)
    if lengths is not None:
        if cu_seqlens is not None:
            raise ArgumentError("lengths", "None where cu_seqlens is given", "both")
        check_lengths(lengths, q, "q")
        lengths = lengths.contiguous()
    if cu_seqlens is not None:
        check_starts(cu_seqlens, q, "q")
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        check_scale(scale)
    compiling = torch.compiler.is_compiling()
    offsets = encode(pattern) if compiling else encode_cached(pattern)
    args = (q, k, v, pattern.window, offsets, pattern.causal, lengths, cu_seqlens, scale, backend)
    # Subclasses and functorch's wrappers have no address to hand out.
    if compiling or type(q) not in _PLAIN or torch._C._are_functorch_transforms_active():
        out, lse = torch.ops.fastrec.window_sparse_attention(*args)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _torch_op.Eager.apply(*args)
    else:
        out, lse = _torch_op.forward(*args, with_lse=return_lse)
    return (out, lse) if return_lse else out


SPEC = OpSpec(
    op_id="window_sparse_attention",
    summary="softmax attention over a window and a few far positions, forward and backward",
    function=window_sparse_attention,
    reference=window_sparse_attention_reference,
    backends=_torch_op.BACKENDS,
    samples=samples,
    compare=compare,
)

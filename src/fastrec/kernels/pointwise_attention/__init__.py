"""``pointwise_attention``: HSTU's attention, SiLU of the scores in place of a softmax.

    out[i] = sum_j silu(scale * q[i] . k[j] + bias(i, j)) / norm * v[j]   over the j that i sees

The bias is a table by relative position, one by the bucket of the time between two events, or both.
Source: Zhai et al. 2024, "Actions Speak Louder than Words".
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels._registry import OpSpec
from fastrec.kernels._torch_op import FLOAT_NAMES
from fastrec.kernels.pointwise_attention import _torch_op
from fastrec.kernels.pointwise_attention.buckets import MAX_BUCKETS, log_time_edges
from fastrec.kernels.pointwise_attention.reference import pointwise_attention_reference
from fastrec.kernels.pointwise_attention.samples import compare, samples

__all__ = ["SPEC", "log_time_edges", "pointwise_attention"]

MAX_DIMS = 256
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _check_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, jagged: bool) -> None:
    rank, layout = (3, "[T, H, D]") if jagged else (4, "[B, H, L, D]")
    if q.dim() != rank:
        raise ShapeError("q", f"shape {layout}", list(q.shape))
    if q.dtype not in FLOAT_NAMES:
        raise DtypeError("q", "float32, bfloat16, float16 or float64", q.dtype)
    for name, x in (("k", k), ("v", v)):
        same = x.shape == q.shape if name == "k" else x.shape[:-1] == q.shape[:-1]
        if not same:
            expected = f"q's shape {list(q.shape)}" + (", but for D" if name == "v" else "")
            raise ShapeError(name, expected, list(x.shape))
        if x.dtype != q.dtype:
            raise DtypeError(name, f"q's dtype {q.dtype}", x.dtype)
        if x.device != q.device:
            raise DeviceError(name, f"q's device {q.device}", x.device)
    for name, x in (("q", q), ("v", v)):
        if x.shape[1] == 0 or not 1 <= x.shape[-1] <= MAX_DIMS:
            expected = f"at least one head and 1 to {MAX_DIMS} dimensions"
            raise ShapeError(name, expected, list(x.shape))


def _integers(
    name: str, x: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, ...] | None
) -> torch.Tensor | None:
    """int64 and contiguous, as the kernels want it; ``shape`` None: any of one dimension."""
    if x is None:
        return None
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        raise DtypeError(name, "int64 or int32", getattr(x, "dtype", type(x).__name__))
    if x.dim() != 1 if shape is None else x.shape != shape:
        raise ShapeError(name, f"shape {'[any]' if shape is None else list(shape)}", list(x.shape))
    if x.device != q.device:
        raise DeviceError(name, f"q's device {q.device}", x.device)
    return x.to(torch.int64).contiguous()


def _table(name: str, x: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if x is None:
        return None
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_NAMES:
        raise DtypeError(name, "a float tensor", getattr(x, "dtype", type(x).__name__))
    if x.device != q.device:
        raise DeviceError(name, f"q's device {q.device}", x.device)
    heads = q.shape[1]
    size = "2 P - 1" if name == "position_bias" else "buckets"
    if x.dim() not in (1, 2) or x.shape[-1] == 0 or (x.dim() == 2 and x.shape[0] != heads):
        raise ShapeError(name, f"shape [{size}] or [{heads}, {size}]", list(x.shape))
    if name == "position_bias" and x.shape[-1] % 2 == 0:
        raise ShapeError(name, "an odd number of entries, 2 P - 1", list(x.shape))
    if name == "time_bias" and x.shape[-1] > MAX_BUCKETS:
        raise ShapeError(name, f"at most {MAX_BUCKETS} buckets", list(x.shape))
    return x.to(torch.float64 if q.dtype is torch.float64 else torch.float32).contiguous()


def checked_options(
    q: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    times: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    sequences: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | int | None],
    scale: float | None,
    norm_length: float | None,
    causal: bool,
) -> tuple[Any, ...]:
    """All but q, k and v, in the order of the torch op, or an error."""
    position_bias, time_bias = tables
    time_edges, timestamps, query_timestamps = times
    lengths, cu_seqlens, targets = sequences
    jagged = cu_seqlens is not None
    if lengths is not None and jagged:
        raise ArgumentError("lengths", "None where cu_seqlens is given", "both")
    cu_seqlens = _integers("cu_seqlens", cu_seqlens, q, None)
    if cu_seqlens is not None and cu_seqlens.shape[0] == 0:
        raise ShapeError("cu_seqlens", "shape [B + 1]", [0])
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lengths = _integers("lengths", lengths, q, (batch,))
    if isinstance(targets, int):
        if targets < 0:
            raise ArgumentError("targets", "a number >= 0", targets)
        targets = torch.full((batch,), targets, device=q.device) if targets else None
    targets = _integers("targets", targets, q, (batch,))
    position_bias = _table("position_bias", position_bias, q)
    time_bias = _table("time_bias", time_bias, q)
    rows = q.shape[:1] if jagged else (batch, q.shape[2])
    if time_bias is None:
        given = {
            "time_edges": time_edges,
            "timestamps": timestamps,
            "query_timestamps": query_timestamps,
        }
        for name, x in given.items():
            if x is not None:
                raise ArgumentError(name, "None without time_bias", "a tensor")
    else:
        for name, x in (("time_edges", time_edges), ("timestamps", timestamps)):
            if x is None:
                raise ArgumentError(name, "a tensor with time_bias", None)
        time_edges = _integers("time_edges", time_edges, q, (time_bias.shape[-1] - 1,))
        timestamps = _integers("timestamps", timestamps, q, rows)
        query_timestamps = _integers("query_timestamps", query_timestamps, q, rows)
        query_timestamps = timestamps if query_timestamps is None else query_timestamps
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ArgumentError("scale", "a finite number", scale)
    if norm_length is None:
        if jagged:
            raise ArgumentError("norm_length", "a number with cu_seqlens", None)
    elif not (math.isfinite(norm_length) and norm_length > 0):
        raise ArgumentError("norm_length", "a finite number > 0", norm_length)
    tables = (position_bias, time_bias)
    times = (time_edges, timestamps, query_timestamps)
    return *tables, *times, lengths, cu_seqlens, targets, float(scale), norm_length, causal


def pointwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
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
    backend: str | None = None,
) -> torch.Tensor:
    """Self-attention with SiLU(scores) / N in place of a softmax, as in HSTU.

    The last ``targets`` rows of a sequence are candidates, the rows before them its history. A
    history row sees the history, up to itself where ``causal``; a candidate sees the history and
    itself, no other candidate. Neither depends on which candidates are scored together.

    Args:
        q, k: [B, H, L, D], or jagged [T, H, D] with ``cu_seqlens``; one dtype of float32, bfloat16,
            float16 (all summed in float32) or float64 (reference only); D from 1 to 256. Any
            strides: views of a merged projection are read in place if D is contiguous.
        v: as k, with a D of its own.
        position_bias: float [2 P - 1], or [H, 2 P - 1] by head: entry P - 1 + (j - i) is added to
            the score of row i and key j. Rows further apart than P - 1 take the outermost entry.
        time_bias: float [buckets] or [H, buckets], at most 4,096: the entry of bucket n is added
            where the times of row i and key j are n of ``time_edges`` or more apart.
        time_edges: int64 [buckets - 1], none below the one before, each 1 to 2^53; see
            :func:`log_time_edges`. Given with ``time_bias``, as is ``timestamps``.
        timestamps: int64 [B, L] or [T], in any unit: of the keys, and of the rows as queries where
            ``query_timestamps`` is None.
        query_timestamps: the same, of the rows as queries. HSTU's published code takes the time of
            the next event.
        lengths: int64 [B], 0 to L: rows from there on belong to no sequence. They are not read,
            NaNs included, and give 0.
        cu_seqlens: int64 or int32 [B + 1], rising from 0 to T: sequence b is rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Excludes ``lengths``. On a GPU the values of
            these and of ``targets`` are not waited for: what is out of range is moved into it.
        targets: int64 [B], or one number for all: how many rows at a sequence's end are candidates.
        scale: factor of q . k; None means D ** -0.5 (HSTU's research code has 1).
        norm_length: N, > 0. None means L; a jagged batch needs it.
        causal: whether history rows see no later row.
        backend: None picks the best once per signature; "cpu", "triton" or "reference" forces one.

    Returns:
        q's shape with v's D, q's dtype, a view of contiguous [B, L, H, D] (or contiguous
        [T, H, D]). Differentiable once with respect to q, k, v and both tables; gradients are the
        same for any number of threads (on a GPU, the tables' differ in their last bits).

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    _check_rows(q, k, v, cu_seqlens is not None)
    options = checked_options(
        q,
        (position_bias, time_bias),
        (time_edges, timestamps, query_timestamps),
        (lengths, cu_seqlens, targets),
        scale,
        norm_length,
        causal,
    )
    args = (q, k, v, *options, backend)
    # Subclasses and functorch's wrappers have no address to hand out.
    plain = type(q) in _PLAIN and not torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() or not plain:
        return torch.ops.fastrec.pointwise_attention(*args)
    learns = any(x is not None and x.requires_grad for x in args[:5])
    if torch.is_grad_enabled() and learns:
        return _torch_op.Eager.apply(*args)
    return _torch_op.forward(*args)


SPEC = OpSpec(
    op_id="pointwise_attention",
    summary="HSTU's attention: SiLU scores with position and time bias, forward and backward",
    function=pointwise_attention,
    reference=pointwise_attention_reference,
    backends=_torch_op.BACKENDS,
    samples=samples,
    compare=compare,
)

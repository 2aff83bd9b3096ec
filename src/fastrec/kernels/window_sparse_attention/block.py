"""The attention block: projections to q, k and v, ``window_sparse_attention``, projection out.

    y = W_o concat_h(attention(W_q,h x, W_k,h x, W_v,h x)) + b_o

On a GPU, for short sequences in inference, one launch; otherwise the three ops one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastrec.errors import ArgumentError, BackendError, DeviceError, DtypeError, ShapeError
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import reason_missing
from fastrec.kernels.window_sparse_attention import AttentionPattern, window_sparse_attention
from fastrec.kernels.window_sparse_attention._config import BLOCK_CHANNELS, BLOCK_ROWS
from fastrec.kernels.window_sparse_attention._spec import encode_cached
from fastrec.kernels.window_sparse_attention._torch_op import DTYPE_NAMES

Biases = tuple[torch.Tensor, torch.Tensor]


def fused_can_run(x: torch.Tensor) -> str | None:
    """Why the one launch can't take this input, or None if it can. Gradients are not asked for."""
    signature = Signature(x.device.type, DTYPE_NAMES[x.dtype])
    if signature.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, the input is {signature.dtype}"
    if x.shape[1] > BLOCK_ROWS or x.shape[2] > BLOCK_CHANNELS:
        return f"it takes L <= {BLOCK_ROWS} and d <= {BLOCK_CHANNELS}, got {list(x.shape)}"
    if (reason := reason_missing(signature.device)) is not None:
        return reason
    older = x.is_cuda and torch.version.hip is None
    if older and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "before sm_90 it does not fit the registers"
    return None


def _check(
    x: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    biases: Biases | None,
    heads: int,
) -> None:
    if x.dim() != 3:
        raise ShapeError("x", "shape [B, L, d]", list(x.shape))
    if x.dtype not in DTYPE_NAMES:
        raise DtypeError("x", "float32, bfloat16, float16 or float64", x.dtype)
    d = x.shape[2]
    if heads < 1 or d % heads or not d:
        raise ArgumentError("heads", f"a divisor of d = {d}", heads)
    expected: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("in_weight", in_weight, (3 * d, d)),
        ("out_weight", out_weight, (d, d)),
    ]
    if biases is not None:
        expected += [("biases", biases[0], (3 * d,)), ("biases", biases[1], (d,))]
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ShapeError(name, f"shape {list(shape)}", list(tensor.shape))
        if tensor.dtype != x.dtype:
            raise DtypeError(name, f"x's dtype {x.dtype}", tensor.dtype)
        if tensor.device != x.device:
            raise DeviceError(name, f"x's device {x.device}", tensor.device)


def window_sparse_attention_block(
    x: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    biases: Biases | None,
    pattern: AttentionPattern,
    *,
    heads: int,
    lengths: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Self-attention with its projections.

    Args:
        x: [B, L, d].
        in_weight, out_weight: [3 d, d], rows of q, k and v in this order, and [d, d]; x's dtype.
        biases: None, or those of both, [3 d] and [d].
        pattern: who sees whom.
        heads: H, a divisor of d.
        lengths: int64 [B], as in ``window_sparse_attention``.
        backend: None fuses where it can and no gradient is asked for; "triton" asks for the one
            launch; "composed" for the three ops.

    Returns:
        [B, L, d], x's dtype. Heads are rounded to it, as between layers.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for is unknown or can't run.
    """
    _check(x, in_weight, out_weight, biases, heads)
    if backend not in (None, "triton", "composed"):
        raise BackendError(f"backend: expected one of triton, composed, got {backend!r}")
    reason = fused_can_run(x)
    tensors = (x, in_weight, out_weight, *(biases or ()))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reason = reason or "a gradient is asked for"
    if torch.compiler.is_compiling():
        reason = reason or "torch compiles the three ops"
    if backend == "triton" and reason:
        raise BackendError(f"window_sparse_attention_block: backend 'triton' can't run: {reason}")
    if backend == "composed" or reason:
        return _composed(x, in_weight, out_weight, biases, pattern, heads, lengths)
    from fastrec.kernels.window_sparse_attention import _check_index, _triton

    if pattern.per_head and pattern.heads not in (None, heads):
        raise ShapeError("pattern", f"offsets for {heads} heads", f"{pattern.heads} lists")
    if lengths is not None:
        lengths = _check_index("lengths", lengths, x)
    spelled = (pattern.window, encode_cached(pattern), pattern.causal)
    return _triton.block(x, in_weight, out_weight, biases, spelled, heads, lengths)


def _composed(
    x: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    biases: Biases | None,
    pattern: AttentionPattern,
    heads: int,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    in_bias, out_bias = biases or (None, None)
    projected = F.linear(x, in_weight, in_bias).unflatten(-1, (3, heads, -1))
    # [B, L, 3, H, D] -> 3 x [B, H, L, D]
    q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
    out = window_sparse_attention(q, k, v, pattern, lengths=lengths)
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)

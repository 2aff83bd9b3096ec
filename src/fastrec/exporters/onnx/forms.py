"""fastrec's layers in standard ONNX: int8 layers as QDQ, the other kernels in aten ops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.errors import BackendError
from fastrec.exporters.onnx.sparse_attention import masked_softmax, sparse_attention
from fastrec.kernels.separable_projection.reference import taps_before, valid_rows
from fastrec.kernels.window_sparse_attention._spec import decode
from fastrec.nn import (
    GroupedLinear,
    Int8Embedding,
    SeparableProjection,
    SparseInt8Linear,
    WindowSparseAttention,
)

_OURS = (
    GroupedLinear,
    Int8Embedding,
    SeparableProjection,
    SparseInt8Linear,
    WindowSparseAttention,
)


class QdqLinear(nn.Module):
    """A ``SparseInt8Linear`` between QuantizeLinear and DequantizeLinear, with its very numbers.

    The weight is dense int8 [K, N] with a scale a column; groups that were pruned are zeros. For
    tracing only: torch cannot compute what it holds.
    """

    def __init__(self, layer: SparseInt8Linear) -> None:
        super().__init__()
        if layer.out is not None:
            raise BackendError("a SparseInt8Linear with a bfloat16 output has no ONNX form")
        self.activation = layer.activation
        self.register_buffer("weight", layer.packed.unpack().t().contiguous())
        self.register_buffer("w_scale", layer.w_scale)
        self.register_buffer("w_zero_point", torch.zeros_like(layer.w_scale, dtype=torch.int8))
        self.register_buffer("bias", layer.bias)
        for name in ("x", "out"):
            scale, zero_point = (
                getattr(layer, f"{name}_scale"),
                getattr(layer, f"{name}_zero_point"),
            )
            self.register_buffer(f"{name}_scale", scale)
            as_u8 = None if zero_point is None else zero_point.to(torch.uint8)
            self.register_buffer(f"{name}_zero_point", as_u8)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 or uint8 [..., K] -> float32 or uint8 [..., N]."""
        if x.dtype is not torch.uint8:
            x = _quantised(x, self.x_scale, self.x_zero_point)
        weight = _dequantised(self.weight, self.w_scale, self.w_zero_point, axis=1)
        y = _dequantised(x, self.x_scale, self.x_zero_point) @ weight
        if self.bias is not None:
            y = y + self.bias
        if self.activation is not None:
            y = F.relu(y) if self.activation == "relu" else F.gelu(y)
        return y if self.out_scale is None else _quantised(y, self.out_scale, self.out_zero_point)


def _quantised(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    inputs = (x, scale, zero_point)
    return torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=torch.uint8, shape=x.shape)


def _dequantised(x: Tensor, scale: Any, zero_point: Any, axis: int | None = None) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (x, scale, zero_point),
        {} if axis is None else {"axis": axis},
        dtype=torch.float32,
        shape=x.shape,
    )


def needs_forms(model: nn.Module) -> bool:
    """Whether the model's layers run ops of fastrec, which other converters do not know."""
    return any(isinstance(module, _OURS) for module in model.modules())


def with_int8_forms(
    model: nn.Module, form: Callable[[SparseInt8Linear], nn.Module] = QdqLinear
) -> nn.Module:
    """The model with its int8 layers in a form that can be exported; a copy that shares the other
    tensors, or the model itself where it has none."""
    if not any(isinstance(module, SparseInt8Linear) for module in model.modules()):
        return model
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, SparseInt8Linear):
            memo[id(module)] = form(module)
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _int8_embedding(ids: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    return F.embedding(ids, table).float() * F.embedding(ids, scale[:, None])


def _grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shuffle: bool = False,
    backend: str | None = None,
) -> Tensor:
    groups, outputs, inputs = weight.shape
    lead = x.dim() - 1
    # [G, ..., I] @ [G, 1.., I, O]: one matrix product a group, over all rows.
    by_group = x.unflatten(-1, (groups, inputs)).movedim(lead, 0)
    kernel = weight.transpose(1, 2).reshape(groups, *(1,) * (lead - 1), inputs, outputs)
    y = (by_group @ kernel).movedim(0, lead)
    if bias is not None:
        y = y + bias.view(groups, outputs)
    return (y.transpose(-1, -2) if shuffle else y).flatten(-2)


def _separable_projection(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    channels, width = depthwise.shape
    before = taps_before(width, causal)
    rows = F.pad(valid_rows(x, lengths).transpose(1, 2), (before, width - 1 - before))
    h = F.conv1d(rows, depthwise[:, None], groups=channels).transpose(1, 2)
    return valid_rows(_grouped_linear(h, pointwise, bias), lengths)


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if lengths is None:
        return scores.softmax(-1) @ v
    seen = torch.arange(k.shape[2], device=k.device) < lengths[:, None, None, None]
    return masked_softmax(scores, seen) @ v


def _window_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    offsets: str,
    causal: bool,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        raise BackendError("window_sparse_attention with cu_seqlens has no ONNX form: use lengths")
    pattern = decode(window, offsets, causal)
    out = sparse_attention(q * scale, k, v, pattern, lengths)
    return out, q.new_zeros(q.shape[:-1])  # nothing that is exported reads the sums' logarithms


# Ops of ours -> what computes the same in aten; torch.export's graph is rewritten with them.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.fastrec.int8_embedding.default: _int8_embedding,
    torch.ops.fastrec.grouped_linear.default: _grouped_linear,
    torch.ops.fastrec.separable_projection.default: _separable_projection,
    torch.ops.fastrec.padded_attention.default: _padded_attention,
    torch.ops.fastrec.window_sparse_attention.default: _window_sparse_attention,
}

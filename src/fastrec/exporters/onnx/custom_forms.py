"""fastrec's layers as operators of ``fastrec.exporters.onnx.custom_ops``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrec.errors import BackendError
from fastrec.exporters.onnx.custom_ops import DOMAIN, VERSION
from fastrec.exporters.onnx.sparse_attention import most_of
from fastrec.kernels.window_sparse_attention._spec import decode
from fastrec.nn import SparseInt8Linear


class CustomLinear(nn.Module):
    """A ``SparseInt8Linear`` as one node, its weight packed as the kernel reads it, without pruned
    groups. For tracing only."""

    def __init__(self, layer: SparseInt8Linear) -> None:
        super().__init__()
        if layer.out is not None:
            raise BackendError("a SparseInt8Linear with a bfloat16 output has no ONNX form")
        self.outputs, self.inputs = layer.out_features, layer.in_features
        for name in ("values", "group_index", "panel_start", "w_scale", "bias"):
            self.register_buffer(name, getattr(layer, name))
        self.attributes: dict[str, Any] = {
            "in_features": layer.in_features,
            "x_scale": float(layer.x_scale),
            "x_zero_point": int(layer.x_zero_point),
            "activation": layer.activation or "none",
        }
        self.quantised = layer.out_scale is not None and layer.out_zero_point is not None
        if layer.out_scale is not None and layer.out_zero_point is not None:
            self.attributes["out_scale"] = float(layer.out_scale)
            self.attributes["out_zero_point"] = int(layer.out_zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 or uint8 [..., K] -> float32 or uint8 [..., N]."""
        inputs = [x, self.values, self.group_index, self.panel_start, self.w_scale]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::SparseInt8Linear{'U8' if self.quantised else ''}",
            inputs if self.bias is None else [*inputs, self.bias],
            self.attributes,
            dtype=torch.uint8 if self.quantised else torch.float32,
            shape=(*x.shape[:-1], self.outputs),
            version=VERSION,
        )


def window_sparse_attention(
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
    """In place of the op of that name, in torch.export's graph."""
    if cu_seqlens is not None:
        raise BackendError("window_sparse_attention with cu_seqlens has no ONNX form: use lengths")
    pattern = decode(window, offsets, causal)
    longest = most_of(q.shape[2])
    heads = q.shape[1] if pattern.per_head else 1
    lists = [pattern.distances(longest, head) for head in range(heads)]
    flat = [len(lists)]
    for distances in lists:
        flat += [len(distances), *distances]
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::WindowSparseAttention",
        [q, k, v] if lengths is None else [q, k, v, lengths],
        {
            "window": min(window, longest),
            "causal": int(causal),
            "scale": float(scale),
            "pattern": flat,
        },
        dtype=torch.float32,
        shape=q.shape,
        version=VERSION,
    )
    return out, q.new_zeros(q.shape[:-1])  # nothing that is exported reads the sums' logarithms


CUSTOM_DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.fastrec.window_sparse_attention.default: window_sparse_attention
}

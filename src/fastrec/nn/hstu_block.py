"""``HstuBlock``: one layer of HSTU, in place of attention and feed-forward of a transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.errors import ArgumentError, ShapeError
from fastrec.kernels.pointwise_attention import log_time_edges, pointwise_attention
from fastrec.nn._common import check_size
from fastrec.nn.layer_norm import LayerNorm


class HstuBlock(nn.Module):
    """x + W_o (norm(attention(q, k, v)) * u), with u, v, q, k = SiLU(W norm(x)).

    The attention has SiLU(scores) / N in place of a softmax, a bias by relative position and one by
    the time between events; the last ``targets`` rows are candidates, which see the history and
    themselves. Source: Zhai et al. 2024, "Actions Speak Louder than Words".

    Args:
        embed_dim: d.
        num_heads: H.
        attention_dim: width of a head of q and k; None means d / H.
        value_dim: width of a head of v and u; None means d / H.
        max_length: N and the size of the position table, which has 2 max_length - 1 entries. None:
            no such table, and N is the length of the batch (a jagged one then needs
            ``norm_length``).
        time_buckets: entries of the time table, 0 for none. HSTU has 129.
        time_step: width of a bucket in the logarithm of a time difference.
        dropout: rate on the gated result while training.
        bias: whether the projections have one.
        causal: whether history rows see no later row.
        scale: factor of q . k; None means attention_dim ** -0.5 (HSTU's research code has 1).
        eps: of both norms.
        device, dtype: of the parameters, as in torch.

    Attributes:
        norm, out_norm: over d, and over H value_dim.
        in_proj: d -> u, v (H value_dim each), q, k (H attention_dim each), heads behind each other.
        out_proj: H value_dim -> d.
        position_bias: [2 max_length - 1], or None.
        time_bias: [time_buckets], or None; ``time_edges`` is a buffer.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    time_edges: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        attention_dim: int | None = None,
        value_dim: int | None = None,
        max_length: int | None = None,
        time_buckets: int = 0,
        time_step: float = 0.301,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = True,
        scale: float | None = None,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("embed_dim", embed_dim)
        check_size("num_heads", num_heads)
        if None in (attention_dim, value_dim) and embed_dim % num_heads:
            expected = f"a multiple of num_heads = {num_heads}, or attention_dim and value_dim"
            raise ArgumentError("embed_dim", expected, embed_dim)
        self.attention_dim = embed_dim // num_heads if attention_dim is None else attention_dim
        self.value_dim = embed_dim // num_heads if value_dim is None else value_dim
        check_size("attention_dim", self.attention_dim)
        check_size("value_dim", self.value_dim)
        if max_length is not None:
            check_size("max_length", max_length)
        if not 0 <= dropout < 1:
            raise ArgumentError("dropout", "a rate in [0, 1)", dropout)
        self.embed_dim, self.num_heads, self.max_length = embed_dim, num_heads, max_length
        self.dropout, self.causal, self.scale = float(dropout), causal, scale
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        values, keys = num_heads * self.value_dim, num_heads * self.attention_dim
        self.norm = LayerNorm(embed_dim, eps=eps, **kind)
        self.in_proj = nn.Linear(embed_dim, 2 * (values + keys), bias=bias, **kind)
        self.out_norm = LayerNorm(values, eps=eps, **kind)
        self.out_proj = nn.Linear(values, embed_dim, bias=bias, **kind)
        self.register_parameter("position_bias", None)
        self.register_parameter("time_bias", None)
        self.register_buffer("time_edges", None)
        if max_length is not None:
            self.position_bias = nn.Parameter(torch.empty(2 * max_length - 1, **kind))
        if time_buckets:
            edges = log_time_edges(time_buckets, time_step)
            self.time_bias = nn.Parameter(torch.empty(time_buckets, **kind))
            self.time_edges = edges.to(self.time_bias.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """HSTU's: Xavier for the projections, N(0, 0.02) for the tables, biases zero."""
        for layer in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for norm in (self.norm, self.out_norm):
            norm.reset_parameters()
        for table in (self.position_bias, self.time_bias):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        timestamps: Tensor | None = None,
        query_timestamps: Tensor | None = None,
        targets: Tensor | int | None = None,
        norm_length: float | None = None,
    ) -> Tensor:
        """The layer's output.

        Args:
            x: [B, L, d], or jagged [T, d] with ``cu_seqlens``.
            lengths: int64 [B]: rows from there on are padding, which no row sees.
            cu_seqlens: int64 or int32 [B + 1]; excludes ``lengths``.
            timestamps: int64 [B, L] or [T]; needed where there is a time table.
            query_timestamps: the same, of the rows as queries; None means ``timestamps``.
            targets: int64 [B] or a number: how many rows at a sequence's end are candidates.
            norm_length: N; None means ``max_length``, or else L.

        Returns:
            x's shape.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: an argument does not fit.
        """
        jagged = cu_seqlens is not None
        if x.dim() != (2 if jagged else 3) or x.shape[-1] != self.embed_dim:
            layout = f"[{'T' if jagged else 'B, L'}, {self.embed_dim}]"
            raise ShapeError("x", f"shape {layout}", list(x.shape))
        values, keys = self.num_heads * self.value_dim, self.num_heads * self.attention_dim
        projected = F.silu(self.in_proj(self.norm(x)))
        gate, v, q, k = projected.split([values, values, keys, keys], -1)
        rows = tuple(part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        if not jagged:
            rows = tuple(part.transpose(1, 2) for part in rows)
        heads = pointwise_attention(
            *rows,
            position_bias=self.position_bias,
            time_bias=self.time_bias,
            time_edges=self.time_edges,
            timestamps=timestamps,
            query_timestamps=query_timestamps,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            targets=targets,
            scale=self.scale,
            norm_length=self.max_length if norm_length is None else norm_length,
            causal=self.causal,
        )
        merged = (heads if jagged else heads.transpose(1, 2)).flatten(-2)
        gated = F.dropout(self.out_norm(merged) * gate, self.dropout, self.training)
        return x + self.out_proj(gated)

    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"{self.embed_dim}, {self.num_heads}, max_length={self.max_length}"
        return f"{sizes}, time_buckets={0 if self.time_bias is None else len(self.time_bias)}"

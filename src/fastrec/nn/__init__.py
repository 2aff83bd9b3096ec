"""Modules over the kernels, with the signatures of their torch counterparts."""

from __future__ import annotations

from fastrec.nn.grouped_linear import GroupedLinear
from fastrec.nn.hstu_block import HstuBlock
from fastrec.nn.int8_embedding import Int8Embedding
from fastrec.nn.layer_norm import LayerNorm
from fastrec.nn.low_rank_linear import LowRankLinear
from fastrec.nn.multihead_attention import MultiheadAttention
from fastrec.nn.pointwise_conv import PointwiseConv
from fastrec.nn.separable_int8_projection import SeparableInt8Projection
from fastrec.nn.separable_projection import SeparableProjection
from fastrec.nn.sparse_int8_linear import SparseInt8Linear
from fastrec.nn.window_sparse_attention import WindowSparseAttention
from fastrec.nn.window_sparse_int8_attention import WindowSparseInt8Attention

__all__ = [
    "GroupedLinear",
    "HstuBlock",
    "Int8Embedding",
    "LayerNorm",
    "LowRankLinear",
    "MultiheadAttention",
    "PointwiseConv",
    "SeparableInt8Projection",
    "SeparableProjection",
    "SparseInt8Linear",
    "WindowSparseAttention",
    "WindowSparseInt8Attention",
]

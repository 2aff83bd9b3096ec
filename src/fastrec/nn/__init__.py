"""Modules over the kernels, with the signatures of their torch counterparts."""

from __future__ import annotations

from fastrec.nn.int8_embedding import Int8Embedding
from fastrec.nn.sparse_int8_linear import SparseInt8Linear

__all__ = ["Int8Embedding", "SparseInt8Linear"]

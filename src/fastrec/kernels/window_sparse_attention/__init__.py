"""``window_sparse_attention``: softmax attention over a window and a few far positions."""

from __future__ import annotations

from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

__all__ = ["AttentionPattern"]

"""Rivals of ``window_sparse_attention_int8``: float attention on the real numbers meant.

torch has no int8 attention on the CPU: dense, its fused kernel does other work (every key) but is
what a user would call; with the pattern as a mask it does the same work the slow way.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from fastrec import kernels
from rivals._common import Call, other_work


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    q, k, v, pattern = args
    q = (q.float() - kwargs.get("q_zero_point", 0)) * kwargs["q_scale"]
    k = k.float() * kwargs["k_scale"]
    mask = pattern.mask(q.shape[2], q.shape[1])
    return {
        "torch SDPA dense": other_work(
            "every key", lambda: F.scaled_dot_product_attention(q, k, v)
        ),
        "torch SDPA + mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "fastrec fp32": lambda: kernels.window_sparse_attention(q, k, v, pattern),
    }

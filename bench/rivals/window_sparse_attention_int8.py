"""Rivals of ``window_sparse_attention_int8``: float attention on the real numbers meant.

Neither torch nor the runtimes have int8 attention over a mask on the CPU: dense, torch's fused
kernel does other work (every key) but is what a user would call; with the pattern as a mask all do
the same work the slow way. bfloat16 is the narrowest that they offer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from fastrec import kernels
from rivals._common import Call, onnx_attention, other_work
from rivals.window_sparse_attention import SHORT, mask_bias


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    q, k, v, pattern = args
    q = (q.float() - kwargs.get("q_zero_point", 0)) * kwargs["q_scale"]
    k = k.float() * kwargs["k_scale"]
    length = q.shape[2]
    bias = mask_bias(pattern, length, q.dtype)
    half, half_bias = [x.bfloat16() for x in (q, k, v)], bias.bfloat16()
    calls = {
        "torch SDPA dense": other_work(
            "every key", lambda: F.scaled_dot_product_attention(q, k, v)
        ),
        "torch SDPA + mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        "torch SDPA + mask bf16": lambda: F.scaled_dot_product_attention(
            *half, attn_mask=half_bias
        ),
        "fastrec fp32": lambda: kernels.window_sparse_attention(q, k, v, pattern),
        "fastrec bf16": lambda: kernels.window_sparse_attention(*half, pattern),
    }
    return calls | (onnx_attention(q, k, v, bias, threads) if length <= SHORT else {})

"""Rivals of ``padded_attention``: torch's fused attention, plain, with a padding mask and compiled,
and the same graph in ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rivals._common import Call, compiled, named, onnx_attention


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    q, k, v = args
    mask = torch.zeros(q.shape[0], 1, 1, k.shape[2])
    calls = {
        "torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch SDPA + mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "torch.compile SDPA": compiled(F.scaled_dot_product_attention, q, k, v),
    }
    return named(calls | onnx_attention(q, k, v, None, threads))

"""Rivals of ``pointwise_attention_int8``: the float op on the same numbers, and torch's dense form.

No library has this attention in integers; what a model would run instead is float32.
"""

from __future__ import annotations

from typing import Any

from fastrec.kernels import pointwise_attention
from rivals._common import Call, compiled, named
from rivals.pointwise_attention import Dense

SCALES = ("q_scale", "k_scale", "v_scale")


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    scales = [kwargs[name] for name in SCALES]
    options = {name: x for name, x in kwargs.items() if name not in SCALES}
    floats = tuple(x.float() * scale for x, scale in zip(args, scales, strict=True))
    dense = Dense(floats, options)
    return named(
        {
            "fastrec fp32": lambda: pointwise_attention(*floats, **options),
            "torch eager": lambda: dense(*floats),
            "torch.compile": compiled(dense.__call__, *floats),
        }
    )

"""Lowerings of ATen's and fastrec's ops, by kind; importing this fills ``LOWERINGS``."""

from fastrec.runtime.native.lowerings import (
    attention,
    creation,
    elementwise,
    fastrec_ops,
    layers,
    products,
    reductions,
    views,
)

__all__ = [
    "attention",
    "creation",
    "elementwise",
    "fastrec_ops",
    "layers",
    "products",
    "reductions",
    "views",
]

"""Lowerings of ATen's and fastrec's ops, by kind; importing this fills ``LOWERINGS``."""

from fastrec.runtime.native.lowerings import (
    attention,
    convolutions,
    creation,
    elementwise,
    fastrec_ops,
    fourier,
    indexing,
    layers,
    products,
    recurrent,
    reductions,
    views,
)

__all__ = [
    "attention",
    "convolutions",
    "creation",
    "elementwise",
    "fastrec_ops",
    "fourier",
    "indexing",
    "layers",
    "products",
    "recurrent",
    "reductions",
    "views",
]

"""Grouped INT8: a block-diagonal weight in the packed format keeps only the blocks' groups."""

from __future__ import annotations

import torch

from fastrec.errors import DtypeError, ShapeError
from fastrec.kernels.sparse_int8_linear import PackedWeight


def pack_grouped_int8(weight_s8: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
    """Packs a block-diagonal s8 weight for ``sparse_int8_linear``, which then is the grouped layer.

    Of a panel of 32 outputs only the inputs of the groups that it touches are stored; where a
    panel or 4 neighbouring inputs straddle groups, zeros fill the rest. Exact in every case;
    outputs a multiple of 32 and inputs a multiple of 4 a group store nothing in vain.

    Args:
        weight_s8: int8 [G, O, I].
        scale: float32 [G * O], finite and > 0; real weight = s8 weight * scale.

    Returns:
        The weight [G * O, G * I].

    Raises:
        ShapeError, DtypeError, ArgumentError: see above; also G * I > 65,793.
    """
    if weight_s8.dtype != torch.int8:
        raise DtypeError("weight_s8", "int8", weight_s8.dtype)
    if weight_s8.dim() != 3 or 0 in weight_s8.shape:
        raise ShapeError("weight_s8", "shape [G, O, I], all > 0", list(weight_s8.shape))
    return PackedWeight.pack(torch.block_diag(*weight_s8), scale)

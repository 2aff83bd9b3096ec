"""The definition of ``int8_embedding`` in pure torch."""

from __future__ import annotations

import torch

from fastrec.errors import IdRangeError


def int8_embedding_reference(
    ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Same arguments, results and errors as :func:`fastrec.kernels.int8_embedding`."""
    outside = (ids < 0) | (ids >= len(table))
    if bool(outside.any()):
        raise IdRangeError("ids", f"ids in [0, {len(table)})", int(ids[outside][0]))
    return table[ids].float() * scale[ids].unsqueeze(-1)

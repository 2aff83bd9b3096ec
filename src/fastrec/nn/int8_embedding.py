"""``Int8Embedding``: a drop-in for ``nn.Embedding`` with int8 rows, a quarter of the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError
from fastrec.kernels.int8_embedding import BACKENDS, gather, int8_embedding


class Int8Embedding(nn.Module):
    """Embedding table with symmetric int8 rows: row = weight[i] * scale[i]; inference only.

    ids int64 [...] -> float32 [..., embedding_dim]. Error of an entry <= scale[i] / 2.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        shape = (num_embeddings, embedding_dim)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings))
        self._runs_compiled = False

    @classmethod
    def from_float(cls, embedding: nn.Embedding, levels: int = 127) -> Int8Embedding:
        """Quantises a float table, scale = max |row| / levels; exact zeros stay zeros.

        Args:
            embedding: the float table.
            levels: the largest code, 1 to 127; see :class:`fastrec.Int8`.

        Raises:
            ArgumentError: the table holds a NaN or an infinity; ``levels`` out of range.
        """
        if not 1 <= levels <= 127:
            raise ArgumentError("levels", "1 to 127", levels)
        table = embedding.weight.detach().float().cpu()
        if not bool(torch.isfinite(table).all()):
            raise ArgumentError("embedding", "finite weights", "a NaN or an infinity")
        scale = table.abs().amax(1) / levels
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        module = cls(embedding.num_embeddings, embedding.embedding_dim)
        module.weight = torch.round(table / scale[:, None]).clamp(-levels, levels).to(torch.int8)
        module.scale = scale
        return module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids int64 or int32 [...] -> float32 [..., embedding_dim].

        Raises:
            IdRangeError (an IndexError): an id lies outside the table.
        """
        ids = input
        if getattr(ids, "dtype", None) is torch.int32:  # which torch's tables take too
            ids = ids.long()
        if torch.compiler.is_compiling() or type(ids) is not torch.Tensor:
            return torch.ops.fastrec.int8_embedding(ids, self.weight, self.scale)
        if self._runs_compiled and ids.dtype is torch.int64 and ids.is_cpu and ids.is_contiguous():
            # The table was checked before. Module.__getattr__ costs as much as ten lookups.
            buffers = self._buffers
            return gather(ids, buffers["weight"], buffers["scale"])
        weight, scale = self.weight, self.scale
        rows = int8_embedding(ids, weight, scale)
        contiguous = weight.is_contiguous() and scale.is_contiguous()
        self._runs_compiled = weight.is_cpu and contiguous and BACKENDS.cpu_is_compiled
        return rows

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "scale"):
            self.__dict__["_runs_compiled"] = False  # a new table is checked again
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Embedding:
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = before.to(self.scale.device)
        self._runs_compiled = False
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

"""An item table of few parameters: each vector is put together from shared pieces.

Product quantisation (Jegou et al., 2011), trained further as in RecJPQ (Petrov and Macdonald,
2024): a vector of ``d`` numbers is ``parts`` pieces, each one of ``codewords`` learned ones. Which
one is found once, by k-means on a trained table, and kept as a byte; the pieces are parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.errors import ArgumentError

MAX_CODEWORDS = 256  # a byte each


class ProductTable(nn.Module):
    """ids int64 [...] -> float32 [..., d], in the place of an ``nn.Embedding``.

    Args:
        codes: uint8 [n, parts], which codeword each piece of each row is.
        codewords: float32 [parts, k, d / parts].
    """

    codes: Tensor

    def __init__(self, codes: Tensor, codewords: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.codewords = nn.Parameter(codewords)

    @classmethod
    def of(cls, table: Tensor, parts: int, codewords: int = MAX_CODEWORDS, seed: int = 0
           ) -> ProductTable:  # fmt: skip
        """The nearest one to ``table`` float32 [n, d]; row 0 (padding) stays zero.

        Raises:
            ArgumentError: ``parts`` does not divide d; more codewords than rows or than 256.
        """
        n, d = table.shape
        if parts < 1 or d % parts:
            raise ArgumentError("parts", f"a divisor of d = {d}", parts)
        if not 2 <= codewords <= min(n, MAX_CODEWORDS):
            raise ArgumentError("codewords", f"2 to {min(n, MAX_CODEWORDS)}", codewords)
        found = [_k_means(piece, codewords - 1, seed) for piece in table[1:].chunk(parts, 1)]
        codes = torch.zeros(n, parts, dtype=torch.uint8)
        codes[1:] = torch.stack([code for code, _ in found], 1) + 1
        words = torch.stack([F.pad(center, (0, 0, 1, 0)) for _, center in found])
        return cls(codes, words)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> float32 [..., d]."""
        parts, k, width = self.codewords.shape
        first = torch.arange(parts, device=ids.device) * k
        words = self.codes[ids].long() + first
        rows = F.embedding(words, self.codewords.view(parts * k, width)).flatten(-2)
        return rows * (ids > 0)[..., None]


def _k_means(points: Tensor, k: int, seed: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Nearest center of each point, and the centers [k, width]; Lloyd's rounds."""
    generator = torch.Generator().manual_seed(seed)
    centers = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centers).argmin(1)
        count = torch.zeros(k).index_add_(0, nearest, torch.ones(len(points)))
        total = torch.zeros_like(centers).index_add_(0, nearest, points)
        centers = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centers)
    return torch.cdist(points, centers).argmin(1).to(torch.uint8), centers

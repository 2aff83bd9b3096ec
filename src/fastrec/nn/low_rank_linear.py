"""``LowRankLinear``: a drop-in for ``nn.Linear`` as the product of two thin layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError
from fastrec.nn._common import check_linear, check_size, like


class LowRankLinear(nn.Module):
    """y = up(down(x)), a weight of rank r: r * (in_features + out_features) multiply-adds a row.

    Cheaper than the dense layer where r < in * out / (in + out): half of d for a square one. Both
    parts are an ``nn.Linear``, so ``prune_`` and ``quantize_`` treat them as any other. Input
    [..., in_features], output [..., out_features]. Source: the paper's low-rank projections.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        rank: r, at most min(in_features, out_features).
        bias: whether there is a bias.
        device, dtype: of the parameters, as in torch.

    Attributes:
        down: ``nn.Linear(in_features, rank, bias=False)``.
        up: ``nn.Linear(rank, out_features)``, which has the bias.

    Raises:
        ArgumentError: a size that is not positive, or a rank beyond the weight's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_size(name, size)
        check_size("rank", rank)
        if rank > min(in_features, out_features):
            largest = min(in_features, out_features)
            raise ArgumentError("rank", f"at most min(in_features, out_features) = {largest}", rank)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def weight(self) -> torch.Tensor:
        """The product [out_features, in_features], for parents that read a layer's weight."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of ``up``."""
        return self.up.bias

    def reset_parameters(self) -> None:
        """The product's entries get the variance of ``nn.Linear``'s weight, 1 / (3 in_features)."""
        # var(sum over r of down * up) = r * (1 / in) * (1 / 3r)
        nn.init.uniform_(
            self.down.weight, -((3 / self.in_features) ** 0.5), (3 / self.in_features) ** 0.5
        )
        nn.init.uniform_(self.up.weight, -(self.rank**-0.5), self.rank**-0.5)
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    def from_float(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The nearest weight of this rank, by SVD (Eckart and Young): error = the singular values
        left out. Each part takes the root of the singular values, so that both train alike.

        Args:
            linear: the layer to replace; left as it is.
            rank: as in the constructor; exact where the weight has no higher rank.

        Raises:
            DtypeError: not an ``nn.Linear``.
            ArgumentError: weights that are not finite, or a rank that does not fit.
        """
        check_linear(linear)
        inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias
        module = cls(inputs, outputs, rank, bias is not None, **like(linear.weight))
        module.load_dense(linear.weight, bias)
        return module.train(linear.training)

    @torch.no_grad()
    def load_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Become the best approximation of a dense weight [out_features, in_features]."""
        # float64: the smallest of the kept singular values survive the rounding of the SVD.
        left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
        root = singular[: self.rank].sqrt()
        self.down.weight.copy_(root[:, None] * right[: self.rank])
        self.up.weight.copy_(left[:, : self.rank] * root)
        if bias is not None:
            self.up.bias.copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

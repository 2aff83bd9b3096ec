"""``SeparableInt8Projection``: float taps along the sequence, then an INT8 projection."""

from __future__ import annotations

import torch
from torch import nn

from fastrec.errors import DtypeError, ShapeError
from fastrec.kernels.separable_projection import separable_projection
from fastrec.nn.separable_projection import SeparableProjection
from fastrec.nn.sparse_int8_linear import SparseInt8Linear


class SeparableInt8Projection(nn.Module):
    """The INT8 form of :class:`SeparableProjection`; inference only.

    The taps are kernel_size multiply-adds a channel and stay float; the projection, out_features
    multiply-adds a channel, runs on ``sparse_int8_linear`` with its input quantised behind the
    taps. Of a grouped projection only the groups' blocks are stored and computed.

    Args:
        in_features, out_features, kernel_size, bias, causal: as in :class:`SeparableProjection`.

    Attributes:
        depthwise: float32 [in_features, kernel_size].
        pointwise: the :class:`SparseInt8Linear` behind it.
    """

    takes_lengths = True
    depthwise: torch.Tensor
    unit: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size, self.causal = kernel_size, causal
        self.register_buffer("depthwise", torch.zeros(in_features, kernel_size))
        self.register_buffer("unit", torch.ones(in_features, 1, 1), persistent=False)
        self.pointwise = SparseInt8Linear(in_features, out_features, bias)

    @classmethod
    def from_float(
        cls, layer: SeparableProjection, pointwise: SparseInt8Linear
    ) -> SeparableInt8Projection:
        """The float layer's taps before a projection that is already quantised.

        Args:
            layer: the layer to replace; left as it is.
            pointwise: its projection in INT8, calibrated on what comes out of the taps.

        Raises:
            DtypeError: ``layer`` is no ``SeparableProjection``.
        """
        if not isinstance(layer, SeparableProjection):
            raise DtypeError("layer", "a SeparableProjection", type(layer).__name__)
        sizes = (layer.in_features, layer.out_features, layer.kernel_size)
        module = cls(*sizes, layer.bias is not None, layer.causal)
        module.depthwise = layer.depthwise.detach().float().clone()
        module.pointwise = pointwise
        return module.train(layer.training)

    @property
    def bias(self) -> torch.Tensor | None:
        """Of the projection."""
        return self.pointwise.bias

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """x float32 [B, L, in_features] -> float32 [B, L, out_features]; or both without B.

        Args:
            x: the sequence.
            lengths: int64 [B]: rows from there on are never read and come out as zeros.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: an argument does not fit.
        """
        if x.dim() == 2:
            if lengths is not None:
                raise ShapeError("x", f"shape [B, L, {self.in_features}]", list(x.shape))
            return self(x.unsqueeze(0)).squeeze(0)
        # One group a channel, each the factor 1: the float kernel with nothing behind its taps,
        # which engines run too.
        hidden = separable_projection(
            x.float(), self.depthwise, self.unit, None, lengths=lengths, causal=self.causal
        )
        y: torch.Tensor = self.pointwise(hidden)
        if lengths is None:
            return y
        positions = torch.arange(x.shape[1], device=x.device)
        return y.masked_fill((positions >= lengths.unsqueeze(1)).unsqueeze(-1), 0.0)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kernel_size={self.kernel_size}, causal={self.causal}"
        )

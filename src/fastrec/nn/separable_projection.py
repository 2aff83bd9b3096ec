"""``SeparableProjection``: a linear layer that also looks at neighbours in the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastrec.errors import ArgumentError, ShapeError
from fastrec.kernels.separable_projection import MAX_WIDTH, separable_projection
from fastrec.kernels.separable_projection.reference import taps_before, valid_rows
from fastrec.nn._common import autocast, check_groups, check_linear, check_size, like


def depthwise_rows(
    x: torch.Tensor, depthwise: torch.Tensor, lengths: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """The convolution alone; result rows beyond the lengths mean nothing.

    Args:
        x: [B, L, C] or [L, C].
        depthwise: taps [C, W].
        lengths: int64 [B]; rows from there on are read as zeros.
        causal: taps look at the row and those before it.

    Raises:
        ShapeError: lengths without a batch.
    """
    length, width = x.shape[-2], depthwise.shape[1]
    if lengths is not None:
        if x.dim() == 2:
            raise ShapeError("x", f"shape [B, L, {len(depthwise)}]", list(x.shape))
        x = valid_rows(x, lengths)
    before = taps_before(width, causal)
    # Shifted rows times a tap: a few elementwise passes, which engines join into one; grouped
    # convolutions take three times as long on CPUs.
    padded = F.pad(x, (0, 0, before, width - 1 - before))
    sums = padded[..., :length, :] * depthwise[:, 0]
    for tap in range(1, width):
        sums = sums + padded[..., tap : tap + length, :] * depthwise[:, tap]
    return sums


class SeparableProjection(nn.Module):
    """A depthwise convolution along the sequence, then a (grouped) projection, in one pass.

    Input [B, L, in_features] or [L, in_features], output with out_features channels, in the
    parameters' dtype: float32 or bfloat16 on the kernel, float16 and float64 on the reference.
    Costs in_features * (kernel_size + out_features / groups) multiply-adds a row. Source: the
    paper's separable projections; Chollet, "Xception" (2017).

    Args:
        in_features, out_features: channels; multiples of ``groups``.
        kernel_size: taps, 1 to 31; odd, unless causal.
        groups: of the projection; 1 is the plain one.
        bias: whether the projection has a bias.
        causal: taps look at the row and those before it, instead of both ways.
        device, dtype: of the parameters, as in torch.

    Attributes:
        depthwise: [in_features, kernel_size], not flipped, as in ``nn.Conv1d``.
        pointwise: [groups, out_features / groups, in_features / groups].
        bias: [out_features] or None.

    Raises:
        ArgumentError: a size outside what is written above.
    """

    takes_lengths = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        groups: int = 1,
        bias: bool = True,
        causal: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_size("kernel_size", kernel_size)
        check_groups(groups, in_features, out_features)
        if kernel_size > MAX_WIDTH or (kernel_size % 2 == 0 and not causal):
            expected = f"1 to {MAX_WIDTH}" + ("" if causal else ", odd unless causal")
            raise ArgumentError("kernel_size", expected, kernel_size)
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size, self.groups, self.causal = kernel_size, groups, causal
        self.depthwise = nn.Parameter(
            torch.empty(in_features, kernel_size, device=device, dtype=dtype)
        )
        shape = (groups, out_features // groups, in_features // groups)
        self.pointwise = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Conv1d``'s and ``nn.Linear``'s initialisation, each with its fan-in."""
        nn.init.uniform_(self.depthwise, -(self.kernel_size**-0.5), self.kernel_size**-0.5)
        bound = self.pointwise.shape[2] ** -0.5
        nn.init.uniform_(self.pointwise, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        kernel_size: int = 3,
        *,
        groups: int = 1,
        causal: bool = False,
    ) -> SeparableProjection:
        """Starts as the layer it replaces: a depthwise identity, then its weight.

        Exact for ``groups=1``; with more, the blocks that ``GroupedLinear.from_float`` keeps.
        Fine-tuning then finds out what the neighbours are worth.

        Args:
            linear: the layer to replace; left as it is.
            kernel_size, groups, causal: as in the constructor.

        Raises:
            DtypeError: not an ``nn.Linear``.
            ArgumentError: weights that are not finite, or a size that does not fit.
        """
        check_linear(linear)
        inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias
        module = cls(
            inputs, outputs, kernel_size, groups, bias is not None, causal, **like(linear.weight)
        )
        module.load_dense(linear.weight, bias)
        return module.train(linear.training)

    @torch.no_grad()
    def load_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Become the dense weight [out_features, in_features] (its blocks) and its bias."""
        groups, outputs, inputs = self.pointwise.shape
        self.depthwise.zero_()
        self.depthwise[:, taps_before(self.kernel_size, self.causal)] = 1
        blocks = weight.view(groups, outputs, groups, inputs).diagonal(dim1=0, dim2=2)
        self.pointwise.copy_(blocks.permute(2, 0, 1))
        if bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, L, in_features] -> [B, L, out_features]; or both without B.

        Args:
            x: the sequence; zeros are assumed before its start and behind its end.
            lengths: int64 [B], 0 to L: rows from there on are never read and come out as zeros,
                without bias. None means L. For a batch only.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: an argument does not fit.
        """
        x, depthwise, pointwise, bias = autocast(x, self.depthwise, self.pointwise, self.bias)
        if x.dim() == 2:
            if lengths is not None:
                raise ShapeError("x", f"shape [B, L, {self.in_features}]", list(x.shape))
            batch = x.unsqueeze(0)
            y = separable_projection(batch, depthwise, pointwise, bias, causal=self.causal)
            return y.squeeze(0)
        return separable_projection(
            x, depthwise, pointwise, bias, lengths=lengths, causal=self.causal
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kernel_size={self.kernel_size}, groups={self.groups}, "
            f"bias={self.bias is not None}, causal={self.causal}"
        )

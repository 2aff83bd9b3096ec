"""``GroupedLinear``: a drop-in for ``nn.Linear`` that projects each group of channels by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrec.kernels.grouped_linear import grouped_linear
from fastrec.nn._common import autocast, check_groups, check_linear, check_size, like


class GroupedLinear(nn.Module):
    """y = x W^T + b with a block-diagonal W of ``groups`` blocks.

    Costs in_features * out_features / groups multiply-adds a row and as many weights: O(d^2 / k)
    for k groups instead of O(d^2). Input [..., in_features], output [..., out_features], in the
    parameters' dtype: float32 or bfloat16 on the kernel, float16 and float64 on the reference.
    Source: the paper's grouped projections; channel shuffle from Zhang et al., "ShuffleNet" (2018).

    Args:
        in_features: a multiple of ``groups``.
        out_features: a multiple of ``groups``.
        groups: k; 1 is the dense layer.
        bias: whether there is a bias.
        shuffle: output o of group g at channel o * groups + g instead of g * O + o, so that a
            grouped layer that follows sees every group.
        device, dtype: of the parameters, as in torch.

    Attributes:
        weight: [groups, out_features / groups, in_features / groups].
        bias: [out_features] in the order g * O + o, also with ``shuffle``; or None.

    Raises:
        ArgumentError: a size is not positive, or ``groups`` does not divide both.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        bias: bool = True,
        shuffle: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_groups(groups, in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.groups, self.shuffle = groups, shuffle
        shape = (groups, out_features // groups, in_features // groups)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s initialisation, with a group's fan-in."""
        bound = self.weight.shape[2] ** -0.5
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_float(cls, linear: nn.Linear, groups: int, *, shuffle: bool = False) -> GroupedLinear:
        """The best block-diagonal approximation of a dense layer: its own diagonal blocks.

        The squared Frobenius error is a sum over entries. Entries outside the blocks are lost in
        any case, and those inside are exact: no block-diagonal weight is nearer to W, and for
        white inputs none has a smaller mean squared error of the output. Expect to fine-tune.
        With ``shuffle`` the blocks are those of W's rows in shuffled order, so that each output
        stays in its place. Exact for ``groups=1``.

        Args:
            linear: the layer to replace; left as it is.
            groups, shuffle: as in the constructor.

        Raises:
            DtypeError: not an ``nn.Linear``.
            ArgumentError: weights that are not finite, or ``groups`` that does not divide.
        """
        check_linear(linear)
        inputs, outputs = linear.in_features, linear.out_features
        bias = linear.bias
        module = cls(inputs, outputs, groups, bias is not None, shuffle, **like(linear.weight))
        module.load_dense(linear.weight, bias)
        return module.train(linear.training)

    @torch.no_grad()
    def load_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take over the blocks of a dense weight [out_features, in_features] and its bias."""
        groups, outputs, inputs = self.weight.shape
        # [N, K] -> the rows of each group [G, O, G, I] -> the diagonal over the groups [G, O, I]
        if self.shuffle:
            rows = weight.view(outputs, groups, groups, inputs).transpose(0, 1)
        else:
            rows = weight.view(groups, outputs, groups, inputs)
        self.weight.copy_(rows.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        if bias is not None:
            self.bias.copy_(bias.view(outputs, groups).T.flatten() if self.shuffle else bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features].

        Raises:
            ShapeError, DtypeError, DeviceError: x does not fit the parameters.
        """
        x, weight, bias = autocast(x, self.weight, self.bias)
        return grouped_linear(x, weight, bias, shuffle=self.shuffle)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"groups={self.groups}, bias={self.bias is not None}, shuffle={self.shuffle}"
        )

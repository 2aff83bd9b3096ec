"""``PointwiseConv``: a convolution of kernel 1, which is a linear layer on channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.nn._common import check_size, like

KINDS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a ``Conv1d`` or ``Conv2d`` that mixes channels alone."""
    if type(module) not in KINDS.values():
        return False
    single = all(size == 1 for size in (*module.kernel_size, *module.stride, module.groups))
    padding = module.padding
    flat = padding in ("valid", "same") or (
        not isinstance(padding, str) and all(size == 0 for size in padding)
    )
    return single and flat


class PointwiseConv(nn.Module):
    """``nn.Conv1d`` or ``nn.Conv2d`` of kernel 1, its weight in a layer ``linear``.

    :func:`fastrec.quantize_` treats that as any ``nn.Linear``.

    Args:
        in_channels, out_channels: C and C'.
        dims: 1 or 2 sizes behind the channels.
        bias: whether there is one.
        device, dtype: of the parameters, as in torch.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dims: int = 1,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("in_channels", in_channels)
        check_size("out_channels", out_channels)
        if dims not in KINDS:
            raise ArgumentError("dims", "1 or 2", dims)
        self.in_channels, self.out_channels, self.dims = in_channels, out_channels, dims
        self.linear = nn.Linear(in_channels, out_channels, bias, device, dtype)

    @classmethod
    def from_float(cls, conv: nn.Conv1d | nn.Conv2d) -> PointwiseConv:
        """Takes over a convolution; its weights are copied, it is left as it is.

        Raises:
            DtypeError: not an ``nn.Conv1d`` or ``nn.Conv2d``.
            ArgumentError: it has another kernel, stride or padding, or several groups.
        """
        if type(conv) not in KINDS.values():
            raise DtypeError("conv", "a torch.nn.Conv1d or Conv2d", type(conv).__name__)
        if not is_pointwise(conv):
            raise ArgumentError("conv", "kernel 1, stride 1, no padding, one group", conv)
        dims = len(conv.kernel_size)
        bias = conv.bias is not None
        module = cls(conv.in_channels, conv.out_channels, dims, bias, **like(conv.weight))
        with torch.no_grad():
            module.linear.weight.copy_(conv.weight.flatten(1))
            if conv.bias is not None:
                module.linear.bias.copy_(conv.bias)
        for own, old in ((module.linear.weight, conv.weight), (module.linear.bias, conv.bias)):
            if old is not None:
                own.requires_grad_(old.requires_grad)
        return module.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C', ...], with or without B.

        Raises:
            ShapeError: another number of dimensions or channels.
        """
        channels = -1 - self.dims
        if (
            input.dim() not in (self.dims + 1, self.dims + 2)
            or input.shape[channels] != self.in_channels
        ):
            expected = f"[B, {self.in_channels}, {', '.join('LM'[: self.dims])}]"
            raise ShapeError("input", expected, list(input.shape))
        return self.linear(input.movedim(channels, -1)).movedim(-1, channels)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, dims={self.dims}"

"""``LayerNorm``: torch's, with CPU inference that rounds as the native engine does."""

from __future__ import annotations

import torch
from torch import nn

from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.layer_norm_quantize import layer_norm_quantize

# Others (fake tensors, functional wrappers) have no memory for a kernel to read.
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` with the same arguments, parameters and state.

    Float32 rows on the CPU, where no gradient is wanted, go to ``layer_norm_quantize``: the same
    bits on every CPU and in the native engine, where torch's depend on the instruction set. An int8
    layer behind it then gets the very integers that it gets in the engine. Everything else
    (training, other dtypes and devices, tracing, norms over several dimensions) is torch's.
    """

    @classmethod
    def from_float(cls, norm: nn.LayerNorm) -> LayerNorm:
        """The same norm; it shares the parameters."""
        affine = norm.weight is not None
        shape = list(norm.normalized_shape)
        copy = cls(shape, norm.eps, affine, affine and norm.bias is not None, device="meta")
        copy.weight, copy.bias = norm.weight, norm.bias
        return copy.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., D]."""
        if (
            torch.compiler.is_compiling()
            or type(x) not in _PLAIN_TENSORS
            or x.dtype is not torch.float32
            or not x.is_cpu
            or len(self.normalized_shape) != 1
            or x.shape[-1:] != self.normalized_shape
            or (self.weight is not None and self.weight.dtype is not torch.float32)
            or (torch.is_grad_enabled() and self._wants_gradients(x))
            or torch.is_autocast_enabled("cpu")
            or reason_missing() is not None
        ):
            return super().forward(x)
        y = layer_norm_quantize(x, self.weight, self.bias, eps=self.eps)
        assert isinstance(y, torch.Tensor)
        return y

    def _wants_gradients(self, x: torch.Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.parameters())

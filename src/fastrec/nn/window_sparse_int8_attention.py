"""``WindowSparseInt8Attention``: the attention of a quantised model, in 8-bit integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrec.errors import ArgumentError, DtypeError
from fastrec.kernels.activation_quantize import activation_quantize
from fastrec.kernels.window_sparse_attention_int8 import window_sparse_attention_int8
from fastrec.nn.window_sparse_attention import WindowSparseAttention


class WindowSparseInt8Attention(WindowSparseAttention):
    """A ``WindowSparseAttention`` whose scores and weighted sums are 8-bit integers in inference.

    q and k are rounded with calibrated scales, v by the largest valid |v| of each sequence and head
    in the call itself: the dynamic-range quantisation of the paper's Value branch. What wants a
    gradient, weights or a mask, and what is not float32 on the CPU, is computed as in the float
    module. Source: ``window_sparse_attention_int8``.

    Attributes:
        q_scale, k_scale: float32 [], steps of q and k; int8 around zero.
    """

    q_scale: Tensor
    k_scale: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("q_scale", torch.tensor(1.0))
        self.register_buffer("k_scale", torch.tensor(1.0))
        self._scales = (1.0, 1.0)

    @classmethod
    def from_attention(
        cls, attention: WindowSparseAttention, q_scale: float, k_scale: float
    ) -> WindowSparseInt8Attention:
        """Takes over the projections of ``attention``, float or INT8: they are shared, not copied.

        Raises:
            DtypeError: not a ``WindowSparseAttention``.
            ArgumentError: a scale that is not positive and finite.
        """
        if not isinstance(attention, WindowSparseAttention):
            raise DtypeError("attention", "a WindowSparseAttention", type(attention).__name__)
        for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
            if not 0 < scale < float("inf"):
                raise ArgumentError(name, "a positive number", scale)
        narrow = None if attention.qk_dim == attention.head_dim else attention.qk_dim
        with torch.device("meta"):
            new = cls(
                attention.embed_dim,
                attention.num_heads,
                attention.dropout,
                batch_first=attention.batch_first,
                pattern=attention.pattern,
                projection=attention.projection,
                groups=attention.groups,
                kernel_size=attention.kernel_size,
                rank=attention.rank,
                qk_rank=narrow,
            )
        new.in_proj, new.out_proj = attention.in_proj, attention.out_proj
        new.q_scale, new.k_scale = torch.tensor(q_scale), torch.tensor(k_scale)
        new._read_scales()
        return new.train(attention.training)

    def _read_scales(self) -> None:
        # As numbers, once: a call reads no tensor for them, and a trace holds them.
        self._scales = (float(self.q_scale), float(self.k_scale))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_scales()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if learns or any(x.dtype is not torch.float32 or not x.is_cpu for x in (q, k, v)):
            return super()._attend(q, k, v, lengths)
        q_scale, k_scale = self._scales
        q8, k8 = (
            activation_quantize(x, out="uint8", out_scale=scale, out_zero_point=128)
            for x, scale in ((q, q_scale), (k, k_scale))
        )
        return window_sparse_attention_int8(
            q8,
            k8,
            v,
            self.pattern,
            q_scale=q_scale,
            k_scale=k_scale,
            lengths=lengths,
            scale=self.head_dim**-0.5,
        )

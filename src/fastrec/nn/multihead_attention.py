"""``MultiheadAttention``: ``nn.MultiheadAttention`` with a layer for each projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.nn._common import NO_FUSED_PATH, check_size, like
from fastrec.nn._masks import bias_of_mask


class MultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose q, k, v and output projections are layers of their own.

    torch keeps the first three in one parameter that no layer owns, so nothing can take their
    place. Here :func:`fastrec.quantize_` and others treat each as any ``nn.Linear``; the native
    engine makes one product of those with the same input. Signature, defaults and results are
    torch's, NaN for a query that may see no key among them.

    Args:
        embed_dim: d, a multiple of ``num_heads``.
        num_heads: H.
        dropout: rate on the attention weights while training.
        bias: whether the projections have one.
        add_bias_kv, add_zero_attn: there for the signature: False only.
        kdim, vdim: widths of key and value; None means d.
        batch_first: [B, L, d] if True, [L, B, d] if False.
        device, dtype: of the parameters, as in torch.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    # nn.TransformerEncoder and its layers look here whether they may bypass this module.
    in_proj_bias = None
    in_proj_weight = NO_FUSED_PATH
    _qkv_same_embed_dim = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("embed_dim", embed_dim)
        check_size("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ArgumentError("embed_dim", f"a multiple of num_heads = {num_heads}", embed_dim)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ArgumentError(name, "False", value)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, float(dropout)
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        like_torch = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **like_torch)
        self.k_proj = nn.Linear(self.kdim, embed_dim, **like_torch)
        self.v_proj = nn.Linear(self.vdim, embed_dim, **like_torch)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **like_torch)

    @classmethod
    def from_float(cls, mha: nn.MultiheadAttention) -> MultiheadAttention:
        """Takes over an attention; its weights are copied, it is left as it is.

        Raises:
            DtypeError: not an ``nn.MultiheadAttention``.
            ArgumentError: it has ``add_bias_kv`` or ``add_zero_attn``.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise DtypeError("mha", "a torch.nn.MultiheadAttention", type(mha).__name__)
        module = cls(
            mha.embed_dim,
            mha.num_heads,
            mha.dropout,
            mha.in_proj_bias is not None,
            mha.bias_k is not None,
            mha.add_zero_attn,
            mha.kdim,
            mha.vdim,
            mha.batch_first,
            **like(mha.out_proj.weight),
        )
        if mha._qkv_same_embed_dim:
            weights = mha.in_proj_weight.chunk(3)
        else:
            weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        layers = (module.q_proj, module.k_proj, module.v_proj, module.out_proj)
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        with torch.no_grad():
            for layer, weight, bias in zip(
                layers, (*weights, mha.out_proj.weight), (*biases, mha.out_proj.bias), strict=True
            ):
                layer.weight.copy_(weight).requires_grad_(mha.out_proj.weight.requires_grad)
                if bias is not None:
                    layer.bias.copy_(bias).requires_grad_(bias.requires_grad)
        return module.train(mha.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output and, if asked for, its weights; as torch's.

        Args:
            query: [B, L, d], or [L, B, d] if not ``batch_first``, or [L, d].
            key: [B, S, kdim] likewise.
            value: [B, S, vdim] likewise.
            key_padding_mask: [B, S] or [S]: bool, True where a key is not to be seen, or float,
                added to the scores.
            need_weights: also return the weights.
            attn_mask: bool (True: not seen) or float (added to the scores), [L, S] or
                [B * H, L, S].
            average_attn_weights: weights [B, L, S] averaged over heads, or [B, H, L, S].
            is_causal: says that ``attn_mask``, which must be given, is the causal mask.

        Returns:
            [B, L, d] as query's layout has it, and the weights or None.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: an argument does not fit.
        """
        if is_causal and attn_mask is None:
            raise ArgumentError("attn_mask", "the causal mask, as is_causal says so", None)
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ShapeError("query", f"shape [B, L, {self.embed_dim}]", list(query.shape))

        def rows_first(x: Tensor) -> Tensor:
            x = x if batched else x.unsqueeze(0)
            return x if self.batch_first or not batched else x.transpose(0, 1)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        q = heads(self.q_proj(rows_first(query)))
        k = heads(self.k_proj(rows_first(key)))
        v = heads(self.v_proj(rows_first(value)))
        causal = is_causal and key_padding_mask is None and not need_weights
        bias = None if causal else self._bias(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if bias is None else scores + bias).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            context = weights @ v
        else:
            context = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal
            )
        out = self.out_proj(context.transpose(1, 2).flatten(2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _bias(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one, added to the scores [B, H, L, S]."""
        batch, heads, length = q.shape[:3]
        size = k.shape[2]
        total: Tensor | None = None
        if attn_mask is not None:
            shape = (length, size) if attn_mask.dim() == 2 else (batch * heads, length, size)
            total = bias_of_mask("attn_mask", attn_mask, shape, q).to(q.dtype)
            total = total if total.dim() == 2 else total.view(batch, heads, length, size)
        if key_padding_mask is not None:
            mask = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
            padding = bias_of_mask("key_padding_mask", mask, (batch, size), q).to(q.dtype)
            padding = padding[:, None, None, :]
            total = padding if total is None else total + padding
        return total

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}"
        )

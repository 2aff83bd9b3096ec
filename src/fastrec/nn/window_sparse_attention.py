"""``WindowSparseAttention``: ``nn.MultiheadAttention`` over a window and a few far positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels.window_sparse_attention import window_sparse_attention
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.nn._common import NO_FUSED_PATH, check_size, like
from fastrec.nn._masks import bias_of_lengths, bias_of_mask, lengths_of_mask
from fastrec.nn._projections import (
    PROJECTIONS,
    Projection,
    load_dense,
    make_projection,
    output_layer,
    project,
)
from fastrec.nn.attention_map import AttentionMap


class WindowSparseAttention(nn.Module):
    """Multi-head self-attention in which position i sees only the keys its pattern shows it.

    The signature of ``nn.MultiheadAttention``, at O(L (w + log L) d) instead of O(L^2 d), in O(L)
    memory, forward and backward. A window >= L - 1 gives dense attention. What differs from torch:

    - ``batch_first`` is True and ``need_weights`` is False by default.
    - A query with no key to see gets zeros from the attention, where torch gives NaN.
    - ``add_bias_kv``, ``add_zero_attn``, ``kdim`` and ``vdim`` of cross attention are refused.
    - Position i of the query and of the key is the same event: both have the same length L.

    What the kernel cannot do is computed over the L x L scores, with the same pattern, in O(L^2 d):
    ``need_weights=True``, an ``attn_mask``, dropout while training, and a ``key_padding_mask`` that
    is not padding at the end (in eager mode; a traced one is an error when it runs).

    Float32, bfloat16 and float16 run on the kernel, float64 on its reference. Source: the paper's
    local + sparse attention with grouped, separable or low-rank projections.

    Args:
        embed_dim: d, a multiple of ``num_heads``.
        num_heads: H.
        dropout: rate on the attention weights while training.
        bias: whether the projections have one.
        add_bias_kv, add_zero_attn, kdim, vdim: there for the signature.
        batch_first: [B, L, d] if True, [L, B, d] if False.
        device, dtype: of the parameters, as in torch.
        pattern: which keys each query sees; None means a window of 16 and the powers of two.
        projection: what computes q, k, v (``in_proj``) and the result (``out_proj``): "dense",
            an ``nn.Linear``; "grouped", a ``GroupedLinear``, the inner one shuffled, so that each
            head sees all groups; "separable", a ``SeparableProjection``; "low_rank", a
            ``LowRankLinear``. ``prune_`` and ``quantize_`` treat each ``nn.Linear`` in there as
            any other.
        groups: of "grouped" (2 at least makes sense) and "separable".
        kernel_size: of "separable", which is causal where the pattern is.
        rank: of "low_rank".
        qk_rank: r, width of a head of q and k; None means d / H. Fewer weights and multiply-adds
            in ``in_proj``, and in scores over L x L; the kernel wants q as wide
            as v and gets zeros to fill it up.

    Attributes:
        in_proj: d -> 2 H r + d: q's heads, k's heads, v's heads.
        out_proj: d -> d.
        record: None, or the list to which ``fastrec.models.record_attention`` has each forward
            append its :class:`~fastrec.nn.attention_map.AttentionMap`.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    # nn.TransformerEncoderLayer looks here whether it may bypass this module, and then does not.
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
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: AttentionPattern | None = None,
        projection: Projection = "dense",
        groups: int = 1,
        kernel_size: int = 3,
        rank: int | None = None,
        qk_rank: int | None = None,
    ) -> None:
        super().__init__()
        check_size("embed_dim", embed_dim)
        check_size("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ArgumentError("embed_dim", f"a multiple of num_heads = {num_heads}", embed_dim)
        if not 0 <= dropout < 1:
            raise ArgumentError("dropout", "a rate in [0, 1)", dropout)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ArgumentError(name, "False: a key without a position fits no pattern", value)
        for name, size in (("kdim", kdim), ("vdim", vdim)):
            if size not in (None, embed_dim):
                raise ArgumentError(name, f"None or embed_dim = {embed_dim}", size)
        pattern = AttentionPattern(window=16) if pattern is None else pattern
        if not isinstance(pattern, AttentionPattern):
            raise DtypeError("pattern", "an AttentionPattern", type(pattern).__name__)
        if pattern.heads not in (None, num_heads):
            raise ArgumentError(
                "pattern", f"offsets for num_heads = {num_heads}", f"{pattern.heads} lists"
            )
        if projection not in PROJECTIONS:
            raise ArgumentError("projection", f"one of {', '.join(PROJECTIONS)}", projection)
        self.head_dim = embed_dim // num_heads
        self.qk_dim = self.head_dim if qk_rank is None else qk_rank
        check_size("qk_rank", self.qk_dim)
        if self.qk_dim > self.head_dim:
            expected = f"at most embed_dim / num_heads = {self.head_dim}"
            raise ArgumentError("qk_rank", expected, qk_rank)
        if projection == "low_rank" and rank is None:
            raise ArgumentError("rank", "an integer with projection='low_rank'", None)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, float(dropout)
        self.batch_first, self.pattern, self.projection = batch_first, pattern, projection
        self.groups, self.kernel_size, self.rank = groups, kernel_size, rank
        self.record: list[AttentionMap] | None = None
        like_torch = {"bias": bias, "device": device, "dtype": dtype}
        self.in_proj = self._make(2 * num_heads * self.qk_dim + embed_dim, True, like_torch)
        self.out_proj = self._make(embed_dim, False, like_torch)
        self.reset_parameters()

    def _make(self, outputs: int, shuffle: bool, like_torch: dict[str, Any]) -> nn.Module:
        return make_projection(
            self.projection,
            self.embed_dim,
            outputs,
            groups=self.groups,
            kernel_size=self.kernel_size,
            rank=self.rank,
            causal=self.pattern.causal,
            shuffle=shuffle,
            **like_torch,
        )

    def reset_parameters(self) -> None:
        """``nn.MultiheadAttention``'s: Xavier for a dense ``in_proj``, biases zero."""
        for layer in (self.in_proj, self.out_proj):
            layer.reset_parameters()
            bias = output_layer(layer)[1]
            if bias is not None:
                nn.init.zeros_(bias)
        if isinstance(self.in_proj, nn.Linear):
            nn.init.xavier_uniform_(self.in_proj.weight)

    @classmethod
    def from_mha(
        cls,
        mha: nn.MultiheadAttention,
        pattern: AttentionPattern,
        *,
        projection: Projection = "dense",
        groups: int = 1,
        kernel_size: int = 3,
        rank: int | None = None,
        qk_rank: int | None = None,
    ) -> WindowSparseAttention:
        """Takes over a trained attention; its weights are copied, it is left as it is.

        With projection "dense" or "separable" (groups 1) only the pattern changes the result: none
        at all for a window >= L - 1. "grouped" and "low_rank" approximate each projection as
        ``GroupedLinear.from_float`` and ``LowRankLinear.from_float`` do. ``qk_rank`` gives each
        head the q and k whose scores are nearest to its own, by SVD of W_q^T W_k, biases included.

        Args:
            mha: batch_first, dropout, bias, device and dtype are kept.
            pattern, projection, groups, kernel_size, rank, qk_rank: as in the constructor.

        Raises:
            DtypeError: not an ``nn.MultiheadAttention``.
            ArgumentError: it has ``kdim``, ``vdim``, ``add_bias_kv`` or ``add_zero_attn``, or a
                value does not fit.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise DtypeError("mha", "a torch.nn.MultiheadAttention", type(mha).__name__)
        if not mha._qkv_same_embed_dim:
            raise ArgumentError("mha", "kdim and vdim equal to embed_dim", "others")
        module = cls(
            mha.embed_dim,
            mha.num_heads,
            mha.dropout,
            mha.in_proj_bias is not None,
            mha.bias_k is not None,
            mha.add_zero_attn,
            batch_first=mha.batch_first,
            pattern=pattern,
            projection=projection,
            groups=groups,
            kernel_size=kernel_size,
            rank=rank,
            qk_rank=qk_rank,
            **like(mha.out_proj.weight),
        )
        weight, bias = mha.in_proj_weight.detach(), mha.in_proj_bias
        bias = None if bias is None else bias.detach()
        if module.qk_dim < module.head_dim:
            weight, bias = _low_rank_scores(weight, bias, module.num_heads, module.qk_dim)
        load_dense(module.in_proj, weight, bias)
        load_dense(module.out_proj, mha.out_proj.weight, mha.out_proj.bias)
        return module.train(mha.training)

    @classmethod
    def from_float(
        cls, mha: nn.MultiheadAttention, pattern: AttentionPattern, **options: Any
    ) -> WindowSparseAttention:
        """:meth:`from_mha` by the name that all modules have."""
        return cls.from_mha(mha, pattern, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output and, if asked for, its weights.

        Args:
            query: [B, L, d], or [L, B, d] if not ``batch_first``, or [L, d].
            key, value: query's shape; None means the query. Where all three are one tensor, they
                are projected in one go.
            key_padding_mask: bool [B, L] (or [L]), True where a key is not to be seen; or float
                with 0 and -inf. Padding at the end runs on the kernel.
            need_weights: also return the weights, over L x L scores.
            attn_mask: bool (True: not seen) or float (added to the scores), [L, L] or
                [B * H, L, L]; applies in addition to the pattern, over L x L scores.
            average_attn_weights: weights [B, L, L] averaged over heads, or [B, H, L, L].
            is_causal: says that ``attn_mask`` is the causal mask, which is then not read; the
                pattern must be causal.
            lengths: int64 [B], 0 to L: the keys before it are valid. Costs less than a
                ``key_padding_mask`` and excludes it.

        Returns:
            query's shape and dtype (autocast's, where it is on), and the weights or None.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: an argument does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ShapeError("query", f"shape [B, L, {self.embed_dim}]", list(query.shape))
        for name, x in (("key", key), ("value", value)):
            if x.shape != query.shape:
                raise ShapeError(name, f"query's shape {list(query.shape)}", list(x.shape))
        if is_causal and not self.pattern.causal:
            raise ArgumentError("is_causal", "False, or a causal pattern", is_causal)
        if is_causal:
            attn_mask = None
        if lengths is not None and key_padding_mask is not None:
            raise ArgumentError("lengths", "None where key_padding_mask is given", "both")

        def rows_first(x: Tensor) -> Tensor:
            x = x if batched else x.unsqueeze(0)
            return x if self.batch_first or not batched else x.transpose(0, 1)

        same = key is query and value is query
        inputs = [rows_first(x) for x in ((query,) if same else (query, key, value))]
        batch, length = inputs[0].shape[:2]
        hidden: Tensor | None = None
        if key_padding_mask is not None:
            mask = key_padding_mask if batched else key_padding_mask.unsqueeze(0)
            hidden = bias_of_mask("key_padding_mask", mask, (batch, length), inputs[0])
            lengths, hidden = lengths_of_mask(hidden)
        q, k, v = self._project(inputs, lengths, hidden)
        drops = self.training and self.dropout > 0
        if self.record is not None:
            self.record.append(self._map(q, k, lengths, hidden, attn_mask))
        if need_weights or drops or attn_mask is not None or hidden is not None:
            if lengths is not None:
                hidden = bias_of_lengths(lengths, inputs[0])
            heads, weights = self._attend_in_full(q, k, v, hidden, attn_mask)
        else:
            q, k = (self._as_wide_as_v(x) for x in (q, k))
            heads = self._attend(q, k, v, lengths)
            weights = None
        # [B, H, L, D] -> [B, L, d]; the kernel's result is a view of [B, L, H, D]
        merged = heads.transpose(1, 2).flatten(2)
        out = project(self.out_proj, merged, lengths)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights or weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _project(
        self, inputs: list[Tensor], lengths: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, H, L, r] and v [B, H, L, D], views of one projection of one input."""
        if hidden is not None and getattr(self.in_proj, "takes_lengths", False):
            # Neighbours must not see through the convolution what they may not attend.
            seen = (hidden > -torch.inf).unsqueeze(-1)
            inputs = [torch.where(seen, x, 0.0) for x in inputs]
        sizes = [self.num_heads * self.qk_dim] * 2 + [self.embed_dim]
        if len(inputs) == 1:
            parts = list(project(self.in_proj, inputs[0], lengths).split(sizes, -1))
        elif type(self.in_proj) is nn.Linear:
            weights = self.in_proj.weight.split(sizes)
            bias = self.in_proj.bias
            biases = [None] * 3 if bias is None else bias.split(sizes)
            parts = [F.linear(*args) for args in zip(inputs, weights, biases, strict=True)]
        else:
            # One kernel's layout: each input is projected in full, and its part taken.
            projected = [project(self.in_proj, x, lengths).split(sizes, -1) for x in inputs]
            parts = [rows[n] for n, rows in enumerate(projected)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """The kernel: [B, H, L, D] of three such."""
        return window_sparse_attention(
            q, k, v, self.pattern, lengths=lengths, scale=self.head_dim**-0.5
        )

    def _as_wide_as_v(self, x: Tensor) -> Tensor:
        return x if self.qk_dim == self.head_dim else F.pad(x, (0, self.head_dim - self.qk_dim))

    def _attend_in_full(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Result and weights [B, H, L, L] by the definition; ``hidden`` [B, L] is added."""
        weights = self._weights(q, k, hidden, attn_mask)
        if self.training and self.dropout > 0:
            weights = F.dropout(weights, self.dropout)
        if hidden is not None:
            # 0 * NaN is NaN: what is padded is not read.
            v = torch.where((hidden > -torch.inf)[:, None, :, None], v, 0.0)
        return weights.to(v.dtype) @ v, weights

    def _weights(
        self, q: Tensor, k: Tensor, hidden: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor:
        """The attention map [B, H, L, L]; zeros in a row that sees no key."""
        batch, heads, length, _ = q.shape
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        pattern = self.pattern.mask(length, heads).to(q.device)
        scores = scores.masked_fill(~pattern, -torch.inf)
        if hidden is not None:
            bias = hidden.to(scores.dtype)[:, None, None, :]
            # A padded key may be NaN: replaced, not added to.
            scores = (scores + bias).masked_fill(bias == -torch.inf, -torch.inf)
        if attn_mask is not None:
            shape = (length, length) if attn_mask.dim() == 2 else (batch * heads, length, length)
            bias = bias_of_mask("attn_mask", attn_mask, shape, q).to(scores.dtype)
            scores = scores + (bias if bias.dim() == 2 else bias.view(scores.shape))
        # A row that sees nothing would be NaN, in its gradient too.
        seen = (scores > -torch.inf).any(-1, keepdim=True)
        weights = torch.where(seen, scores, 0.0).softmax(-1)
        return torch.where(seen, weights, 0.0)

    def _map(
        self,
        q: Tensor,
        k: Tensor,
        lengths: Tensor | None,
        hidden: Tensor | None,
        attn_mask: Tensor | None,
    ) -> AttentionMap:
        masked = hidden is not None or attn_mask is not None

        def weights() -> Tensor:
            bias = hidden if lengths is None else bias_of_lengths(lengths, q[:, 0])
            return self._weights(q, k, bias, attn_mask)

        return AttentionMap(
            q=q,
            k=k,
            scale=self.head_dim**-0.5,
            pattern=None if masked else self.pattern,
            lengths=lengths,
            make_weights=weights,
        )

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}, projection={self.projection!r}, "
            f"qk_dim={self.qk_dim}, pattern={self.pattern}"
        )


def _low_rank_scores(
    weight: Tensor, bias: Tensor | None, heads: int, rank: int
) -> tuple[Tensor, Tensor | None]:
    """[3 d, d] and [3 d] with q's and k's heads narrowed to ``rank``.

    A head's scores are [x, 1]_i^T A_q^T A_k [x, 1]_j with A = [W, b]. The nearest matrix of rank r
    is that of its r largest singular values; q and k take the root of each.
    """
    d = weight.shape[1]
    full = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    # [3, H, D, d + 1]
    a_q, a_k, _ = full.double().unflatten(0, (3, heads, d // heads)).unbind(0)
    left, singular, right = torch.linalg.svd(a_q.transpose(1, 2) @ a_k, full_matrices=False)
    root = singular[:, :rank, None].sqrt()
    q = (left.transpose(1, 2)[:, :rank] * root).flatten(0, 1)
    k = (right[:, :rank] * root).flatten(0, 1)
    full = torch.cat([q.to(weight.dtype), k.to(weight.dtype), full[2 * d :]])
    return (full, None) if bias is None else (full[:, :d], full[:, d])

"""Attention modules of the models: merged projections, one SDPA call, maps recordable on demand.

Glossary: B batch, H heads, L history length, m candidates, d model width, D = d / H head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.kernels.padded_attention import padded_attention
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.kernels.window_sparse_attention_int8 import window_sparse_attention_int8
from fastrec.models.encoder import EncoderConfig
from fastrec.nn import WindowSparseAttention
from fastrec.nn._projections import make_projection, project
from fastrec.nn.attention_map import AttentionMap

# Added to the scores of masked keys. Finite, so that a row with no valid key stays finite, and
# exact in fp16 and bf16; exp(-30000) is 0 in every dtype.
MASKED = -30000.0
# Bytes of 8-bit q, k and v are around this.
MIDDLE = 128
# The patterns of attention to all keys, and to all before.
_EVERY_KEY, _EVERY_KEY_BEFORE = (
    AttentionPattern(window=1 << 30, offsets="none", causal=causal) for causal in (False, True)
)


class KeyMask(NamedTuple):
    """Which keys of each sequence are valid: the first ``length``, said in two ways.

    ``bias`` [B, 1, 1, Lk] is added to the scores (0 or MASKED), ``length`` is int64 [B].
    """

    bias: Tensor
    length: Tensor


class Attention(nn.Module):
    """Scaled dot-product attention core: everything after the input projections.

    ``record`` is None, or the list that :func:`record_attention` collects maps into. ``fused`` says
    whether inference runs on our ``padded_attention`` kernel (:func:`fuse_attention_`).

    After :meth:`attend_in_int8` q, k and v are bytes, and so is the sum of values: scores and sums
    are exact integers, those of ``window_sparse_attention_int8``.

    Attributes:
        int8: None, or float32 [5]: the steps of q, k and v, and ``out_proj``'s input scale (0: it
            takes floats) and zero point.
    """

    int8: Tensor | None

    def __init__(self, d: int, n_heads: int, out_proj: nn.Module | None = None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = d // n_heads
        self.out_proj = nn.Linear(d, d) if out_proj is None else out_proj
        self.record: list[AttentionMap] | None = None
        self.fused = False
        self.register_buffer("int8", None)
        self._int8: tuple[float, ...] | None = None

    def projections(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
        """The layers that make q, k and v, and which (0, 1, 2) each makes, one behind the other."""
        raise NotImplementedError

    def attend_in_int8(self, steps: Sequence[float], out: tuple[float, int] | None = None) -> None:
        """From now on the projections give bytes around 128.

        Args:
            steps: of q, k and v.
            out: scale and zero point of ``out_proj``'s input, where it takes bytes.
        """
        scale, zero_point = (0.0, 0) if out is None else out
        self.int8 = torch.tensor([*steps, scale, zero_point], dtype=torch.float32)
        self._read_int8()

    def _read_int8(self) -> None:
        # As numbers, once: a call reads no tensor for them, and a trace holds them.
        self._int8 = None if self.int8 is None else tuple(self.int8.tolist())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        stored = state_dict.get(prefix + "int8")
        self.int8 = None if stored is None else torch.empty_like(stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_int8()

    def _in_bytes(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool
    ) -> Tensor:
        assert self._int8 is not None
        q_step, k_step, v_step, out_scale, zero_point = self._int8
        return window_sparse_attention_int8(
            q,
            k,
            v,
            _EVERY_KEY_BEFORE if causal else _EVERY_KEY,
            q_scale=q_step,
            k_scale=k_step,
            v_scale=v_step,
            lengths=lengths,
            scale=self.head_dim**-0.5,
            out="uint8" if out_scale else None,
            out_scale=out_scale or None,
            out_zero_point=int(zero_point) if out_scale else None,
        )

    @staticmethod
    def _kernel_takes(*tensors: Tensor) -> bool:
        """Whether ``padded_attention`` may run: it has no backward."""
        if any(t.dtype is not torch.float32 or not t.is_cpu for t in tensors):
            return False
        if len({t.shape[-1] for t in tensors}) > 1:  # narrow q and k
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: KeyMask | None, causal: bool = False
    ) -> Tensor:
        """Attends, merges heads and projects: [B, Lq, d].

        Args:
            q: [B, H, Lq, D].
            k, v: [B, H, Lk, D].
            mask: valid keys; excludes ``causal``.
            causal: no query sees a later key.
        """
        bias = None if mask is None else mask.bias
        lengths = None if mask is None else mask.length
        if self.record is not None:
            self.record.append(self._map(q, k, bias, lengths, causal))
        if self._int8 is not None:
            context = self._in_bytes(q, k, v, lengths, causal)
            return project(self.out_proj, context.transpose(1, 2).flatten(2), lengths)
        # torch's fused bf16 backward on CPU takes 4 times as long as these few matrix products; in
        # fp32 its causal kernel skips half of the work.
        in_steps = (
            self.training and q.device.type == "cpu" and not (causal and q.dtype == torch.float32)
        )
        if self.fused and not (in_steps or causal) and self._kernel_takes(q, k, v):
            context = padded_attention(q, k, v, lengths=lengths)
        elif not in_steps:
            scale = None if q.shape[-1] == self.head_dim else self.head_dim**-0.5
            context = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=causal, scale=scale
            )
        else:
            context = self._weights(q, k, bias, causal) @ v
        return project(self.out_proj, context.transpose(1, 2).flatten(2), lengths)

    def _weights(self, q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        """The attention map [B, H, Lq, Lk]."""
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, MASKED)
        return scores.softmax(-1)

    def _map(
        self, q: Tensor, k: Tensor, bias: Tensor | None, lengths: Tensor | None, causal: bool
    ) -> AttentionMap:
        if self._int8 is not None:
            q, k = ((x.float() - MIDDLE) * s for x, s in zip((q, k), self._int8[:2], strict=True))
        return AttentionMap(
            q=q,
            k=k,
            scale=self.head_dim**-0.5,
            pattern=_EVERY_KEY_BEFORE if causal else _EVERY_KEY,
            lengths=lengths,
            make_weights=functools.partial(self._weights, q, k, bias, causal),
        )


class SelfAttention(Attention):
    """Multi-head self attention with one merged projection ``in_proj`` [3d, d] (q, k, v rows).

    ``encoder`` chooses what projects, and may narrow q and k; its pattern is not looked at.
    """

    def __init__(
        self,
        d: int,
        n_heads: int,
        encoder: EncoderConfig | None = None,
        causal: bool = False,
    ) -> None:
        encoder = EncoderConfig() if encoder is None else encoder
        options: dict[str, Any] = {
            "groups": encoder.groups,
            "kernel_size": encoder.kernel_size,
            "rank": encoder.rank,
            "causal": causal,
        }
        kind = encoder.projection
        super().__init__(d, n_heads, make_projection(kind, d, d, **options))
        self.qk_dim = self.head_dim if encoder.qk_rank is None else encoder.qk_rank
        outputs = 2 * n_heads * self.qk_dim + d
        # Shuffled, so that every head sees every group.
        self.in_proj = make_projection(kind, d, outputs, shuffle=True, **options)

    def projections(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
        return [(self.in_proj, (0, 1, 2))]

    def forward(self, x: Tensor, mask: KeyMask | None = None, causal: bool = False) -> Tensor:
        """x [B, L, d] -> [B, L, d]."""
        merged = project(self.in_proj, x, None if mask is None else mask.length)
        if self.qk_dim == self.head_dim:
            # [B, L, 3d] -> 3 x [B, H, L, D], all views
            qkv = merged.unflatten(-1, (3, self.n_heads, self.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            width = self.n_heads * self.qk_dim
            parts = merged.split([width, width, self.n_heads * self.head_dim], -1)
            q, k, v = (p.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for p in parts)
        return self.attend(q, k, v, mask, causal)


class CrossAttention(Attention):
    """Multi-head attention of queries over a memory; k and v share ``kv_proj`` [2d, d]."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__(d, n_heads)
        self.q_proj = nn.Linear(d, d)
        self.kv_proj = nn.Linear(d, 2 * d)
        self.reset_parameters()

    def reset_parameters(self, sharpness: float = 4.0) -> None:
        """Start as a look-up by similarity: k equals q, and v and the output change nothing.

        "This very item is in the history" is then there from the first step; found from a random
        start, it takes more training than a small run has. ``sharpness`` scales the scores.
        """
        d = self.q_proj.in_features
        with torch.no_grad():
            nn.init.orthogonal_(self.q_proj.weight, gain=sharpness**0.5)
            self.kv_proj.weight[:d].copy_(self.q_proj.weight)
            nn.init.eye_(self.kv_proj.weight[d:])
            nn.init.eye_(self.out_proj.weight)
            for layer in (self.q_proj, self.kv_proj, self.out_proj):
                nn.init.zeros_(layer.bias)

    def projections(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
        return [(self.q_proj, (0,)), (self.kv_proj, (1, 2))]

    def forward(self, query: Tensor, memory: Tensor, mask: KeyMask | None = None) -> Tensor:
        """query [B, m, d], memory [B, L, d] -> [B, m, d]."""
        q = self.q_proj(query).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        kv = self.kv_proj(memory).unflatten(-1, (2, self.n_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, mask)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + ffn(norm(x)), GELU.

    Args:
        d, n_heads, ffn: width, heads, hidden width of the feed-forward part.
        dropout: rate on what the two parts add, while training.
        encoder: what attends and projects; None is a plain transformer's.
        causal: whether the block will be called so; a pattern and a convolution must know.
    """

    attention: SelfAttention | WindowSparseAttention

    def __init__(
        self,
        d: int,
        n_heads: int,
        ffn: int,
        dropout: float = 0.0,
        encoder: EncoderConfig | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        encoder = EncoderConfig() if encoder is None else encoder
        self.attention_norm = nn.LayerNorm(d)
        if encoder.pattern is None:
            self.attention = SelfAttention(d, n_heads, encoder, causal)
        else:
            pattern = encoder.pattern
            self.attention = WindowSparseAttention(
                d,
                n_heads,
                pattern=dataclasses.replace(pattern, causal=True) if causal else pattern,
                projection=encoder.projection,
                groups=encoder.groups,
                kernel_size=encoder.kernel_size,
                rank=encoder.rank,
                qk_rank=encoder.qk_rank,
            )
        self.ffn_norm = nn.LayerNorm(d)
        kind = encoder.ffn_projection
        options: dict[str, Any] = {"groups": encoder.groups, "rank": encoder.rank}
        self.ffn = nn.Sequential(
            make_projection(kind, d, ffn, shuffle=True, **options),
            nn.GELU(),
            make_projection(kind, ffn, d, **options),
        )
        self.dropout = dropout

    def _attend(self, x: Tensor, mask: KeyMask | None, causal: bool) -> Tensor:
        if isinstance(self.attention, WindowSparseAttention):
            lengths = None if mask is None else mask.length
            return self.attention(self.attention_norm(x), lengths=lengths)[0]
        return self.attention(self.attention_norm(x), mask, causal)

    def forward(self, x: Tensor, mask: KeyMask | None = None, causal: bool = False) -> Tensor:
        """x [B, L, d] -> [B, L, d]."""
        if self.training and self.dropout:
            x = x + F.dropout(self._attend(x, mask, causal), self.dropout)
            return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout)
        x = x + self._attend(x, mask, causal)
        return x + self.ffn(self.ffn_norm(x))


def fuse_attention_(model: nn.Module) -> None:
    """From now on, every masked attention of ``model`` runs on the ``padded_attention`` kernel.

    In place, for inference: the kernel has no backward. Causal attention, calls that want a
    gradient, and what is not float32 on the CPU stay with torch.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = True


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionMap]]:
    """Collect the attention maps of each forward inside the block.

    Yields a list to which every attention module of ``model`` appends an
    :class:`~fastrec.nn.attention_map.AttentionMap`, in the order of execution (encoder blocks
    first, the cross attention last). A map holds the queries and keys with their gradients, so that
    a student's can be pulled towards a teacher's; no L x L matrix exists until
    :meth:`~fastrec.nn.attention_map.AttentionMap.weights` is called. Clear the list between
    forwards to free the memory.
    """
    maps: list[AttentionMap] = []
    recordable = (Attention, WindowSparseAttention)
    modules = [module for module in model.modules() if isinstance(module, recordable)]
    before = [module.record for module in modules]
    for module in modules:
        module.record = maps
    try:
        yield maps
    finally:
        for module, record in zip(modules, before, strict=True):
            module.record = record

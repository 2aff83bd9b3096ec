"""``AttentionMap``: a recorded attention map, held as the queries and keys that make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.attention_map_kl import attention_map_kl
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The softmax weights of one attention call, computed on request.

    Attributes:
        q: queries [B, H, Lq, D].
        k: keys [B, H, Lk, D].
        scale: factor of the scores.
        pattern: which key each query sees; None where a mask says it too, so that only
            :meth:`weights` knows the map.
        lengths: int64 [B], valid keys of each sequence; None means all.
        make_weights: computes the map.
    """

    q: Tensor
    k: Tensor
    scale: float
    pattern: AttentionPattern | None
    lengths: Tensor | None
    make_weights: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        """[B, H, Lq, Lk]."""
        return torch.Size((*self.q.shape[:3], self.k.shape[2]))

    def weights(self) -> Tensor:
        """The map [B, H, Lq, Lk], with the gradients of q and k."""
        return self.make_weights()

    def divergence(self, teacher: AttentionMap, length: Tensor | None) -> Tensor | None:
        """KL(teacher || self) over this map's pattern by the ``attention_map_kl`` kernel.

        Args:
            teacher: the map to learn from; no gradient flows to it.
            length: int64 [B], rows of each sequence that count; None means all.

        Returns:
            The mean over valid rows and heads, or None where the kernel does not apply: cross
            attention, other heads or lengths than the teacher's, a mask, a teacher that does not
            see every key of this pattern, a GPU or float64.
        """
        if self.pattern is None or teacher.pattern is None:
            return None
        if self.shape != teacher.shape or self.shape[2] != self.shape[3]:
            return None
        tensors = (self.q, self.k, teacher.q, teacher.k)
        if any(not x.is_cpu or x.dtype is torch.float64 for x in tensors):
            return None
        dense = teacher.pattern.window >= self.shape[2]
        if not (dense or teacher.pattern == self.pattern) or reason_missing() is not None:
            return None
        if not (self._counts(length) and teacher._counts(length)):
            return None
        return attention_map_kl(
            teacher.q,
            teacher.k,
            self.q,
            self.k,
            self.pattern,
            lengths=length,
            teacher_scale=teacher.scale,
            student_scale=self.scale,
            teacher_causal=teacher.pattern.causal,
        )

    def _counts(self, length: Tensor | None) -> bool:
        """Whether the rows before ``length`` see no key beyond it."""
        if self.lengths is None or length is None:
            assert self.pattern is not None
            return self.lengths is length or (self.lengths is None and self.pattern.causal)
        return self.lengths is length or torch.equal(self.lengths, length)

"""A pattern's offsets as a string: what a torch op can take and an exported graph can keep."""

from __future__ import annotations

import functools

import torch

from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

# Window, offsets, causal, lengths, cu_seqlens and scale of a call: checked, lengths and cu_seqlens
# contiguous int64.
Call = tuple[int, str, bool, torch.Tensor | None, torch.Tensor | None, float]
# d_out, d_lse, q, k, v, out and lse.
Rows = tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]


def encode(pattern: AttentionPattern) -> str:
    """The offsets, e.g. ``"log2"``, ``"random:4:100:0"``, ``"all:3,9"`` or ``"heads:3,9;5"``."""
    offsets = pattern.offsets
    if offsets == "random":
        return f"random:{pattern.num_random}:{pattern.max_length}:{pattern.seed}"
    if isinstance(offsets, str):
        return offsets
    if pattern.heads is None:
        return "all:" + ",".join([str(distance) for distance in offsets])
    rows = [",".join([str(distance) for distance in row]) for row in offsets]  # type: ignore[union-attr]
    return "heads:" + ";".join(rows)


encode_cached = functools.lru_cache(maxsize=1024)(encode)


@functools.lru_cache(maxsize=1024)
def decode(window: int, offsets: str, causal: bool) -> AttentionPattern:
    """The pattern that :func:`encode` was given."""
    kind, _, rest = offsets.partition(":")
    if kind == "random":
        num_random, max_length, seed = (int(number) for number in rest.split(":"))
        return AttentionPattern(window, "random", causal, num_random, max_length, seed)
    rows = [[int(n) for n in row.split(",") if n] for row in rest.split(";")]
    if kind == "all":
        return AttentionPattern(window, rows[0], causal)
    if kind == "heads":
        return AttentionPattern(window, rows, causal)
    return AttentionPattern(window, offsets, causal)

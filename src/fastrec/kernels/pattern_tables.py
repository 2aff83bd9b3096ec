"""An AttentionPattern as the compiled kernels, and torch's graphs, take it."""

from __future__ import annotations

import dataclasses
import functools
import json

import torch

from fastrec.errors import DtypeError, ShapeError
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern


@dataclasses.dataclass(frozen=True)
class FarTable:
    """Distances of all heads, one head after the other, and where each head's begin.

    ``keys`` is the largest number of keys that one query can see.
    """

    distances: torch.Tensor  # int64
    starts: torch.Tensor  # int64 [H + 1]
    keys: int


@functools.lru_cache(maxsize=1024)
def far_table(pattern: AttentionPattern, length: int, heads: int) -> FarTable:
    """The table of one pattern at one length; made once."""
    rows = [pattern.distances(length, head) for head in range(heads)]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    sides = 1 if pattern.causal else 2
    near = min(length, sides * pattern.window + 1)
    return FarTable(
        torch.tensor([distance for row in rows for distance in row], dtype=torch.int64),
        torch.tensor(starts, dtype=torch.int64),
        near + sides * max((len(row) for row in rows), default=0),
    )


def check_pattern(pattern: object, heads: int) -> None:
    """Raises where ``pattern`` is no pattern, or one of another number of heads."""
    if not isinstance(pattern, AttentionPattern):
        raise DtypeError("pattern", "an AttentionPattern", type(pattern).__name__)
    if pattern.heads not in (None, heads):
        raise ShapeError("pattern", f"offsets of {heads} heads", f"{pattern.heads} heads")


@torch.compiler.assume_constant_result
def encoded(pattern: AttentionPattern) -> str:
    """The pattern as a torch op takes it: text, a constant of a compiled or exported graph."""
    return json.dumps(dataclasses.astuple(pattern))


@functools.lru_cache(maxsize=1024)
def decoded(text: str) -> AttentionPattern:
    """The pattern of :func:`encoded`."""
    return AttentionPattern(*json.loads(text))

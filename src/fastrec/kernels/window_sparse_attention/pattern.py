"""Which key a query may see: the definition shared by every attention op, module and test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastrec.errors import ArgumentError

if TYPE_CHECKING:
    import torch

Offsets = str | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class AttentionPattern:
    """A window of neighbours plus a few far positions: O(w + log L) keys a query, not L.

    Query i attends key j exactly where j is valid, ``not causal or j <= i``, and
    ``abs(i - j) <= window or abs(i - j) in offsets``. Source: the paper's local + sparse attention,
    O(L w d + L log L d).

    Args:
        window: neighbours on each side, >= 0; 0 keeps the query's own position.
        offsets: the far distances. "none"; "log2": 1, 2, 4, ... below L; "strided:N": the multiples
            of N below L; "random": ``num_random`` distinct ones a head, drawn by ``seed`` from
            window + 1 .. max_length - 1; or the distances, `[n]` for all heads or `[H][n]`.
        causal: no query sees a later key.
        num_random, max_length, seed: for ``offsets="random"`` only.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    window: int
    offsets: Offsets = "log2"
    causal: bool = False
    num_random: int = 0
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int("window", self.window, 0)
        if not isinstance(self.offsets, str):
            object.__setattr__(self, "offsets", _normalised(self.offsets))
        elif self.offsets == "random":
            _check_int("num_random", self.num_random, 1)
            _check_int("max_length", self.max_length, 1)
            assert self.max_length is not None
            room = self.max_length - 1 - self.window
            if self.num_random > room:
                raise ArgumentError(
                    "num_random", f"at most max_length - 1 - window = {room}", self.num_random
                )
        elif self.offsets not in ("none", "log2"):
            self._stride()
        if self.offsets != "random" and (self.num_random or self.max_length is not None):
            name = "num_random" if self.num_random else "max_length"
            raise ArgumentError(name, "given with offsets='random' only", getattr(self, name))

    def _stride(self) -> int:
        head, _, number = str(self.offsets).partition(":")
        if head != "strided" or not number.isdecimal() or int(number) == 0:
            raise ArgumentError(
                "offsets", "'none', 'log2', 'strided:N', 'random' or distances", self.offsets
            )
        return int(number)

    @property
    def heads(self) -> int | None:
        """How many heads the offsets are given for; None: any number."""
        two_dimensional = not isinstance(self.offsets, str) and _is_2d(self.offsets)
        return len(self.offsets) if two_dimensional else None

    @property
    def per_head(self) -> bool:
        """Whether heads differ."""
        return self.offsets == "random" or self.heads is not None

    def distances(self, length: int, head: int = 0) -> tuple[int, ...]:
        """The far distances of one head, rising, in (window, length)."""
        return _distances(self, length, head if self.per_head else 0)

    def mask(self, length: int, heads: int = 1) -> torch.Tensor:
        """The definition as a matrix.

        Args:
            length: L.
            heads: for ``offsets="random"``, how many heads to show.

        Returns:
            bool [H, L, L], True where query i (dim 1) attends key j (dim 2); H is 1 where all
            heads are alike.
        """
        import torch

        position = torch.arange(length)
        distance = position[:, None] - position[None, :]
        masks = []
        for head in range((self.heads or heads) if self.per_head else 1):
            far = torch.tensor(self.distances(length, head), dtype=torch.int64)
            seen = (distance.abs() <= self.window) | torch.isin(distance.abs(), far)
            masks.append(seen & (distance >= 0) if self.causal else seen)
        return torch.stack(masks)


def _check_int(name: str, value: int | None, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(name, f"an integer >= {least}", value)


def _is_2d(offsets: Any) -> bool:
    return len(offsets) > 0 and all(isinstance(row, Sequence) for row in offsets)


def _normalised(offsets: Any) -> Offsets:
    """Tuples of rising, distinct distances, so that equal patterns are equal and hashable."""
    try:
        two_dimensional = _is_2d(offsets)
        rows = [list(row) for row in offsets] if two_dimensional else [list(offsets)]
    except TypeError:
        raise ArgumentError(
            "offsets", "a name, integers or a list of them a head", offsets
        ) from None
    for row in rows:
        for distance in row:
            _check_int("offsets", distance, 1)
    result = tuple(tuple(sorted(set(row))) for row in rows)
    return result if two_dimensional else result[0]


@lru_cache(maxsize=4096)
def _distances(pattern: AttentionPattern, length: int, head: int) -> tuple[int, ...]:
    offsets = pattern.offsets
    if offsets == "none":
        found: Sequence[int] = ()
    elif offsets == "log2":
        found = [1 << bit for bit in range(max(length - 1, 0).bit_length())]
    elif offsets == "random":
        assert pattern.max_length is not None
        drawn = random.Random(pattern.seed * 1_000_003 + head)
        found = sorted(
            drawn.sample(range(pattern.window + 1, pattern.max_length), pattern.num_random)
        )
    elif isinstance(offsets, str):
        found = range(pattern._stride(), length, pattern._stride())
    else:
        found = offsets[head] if pattern.heads is not None else offsets  # type: ignore[assignment]
    return tuple(d for d in found if pattern.window < d < length)

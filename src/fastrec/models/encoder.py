"""``EncoderConfig``: attention pattern and projections of the models' encoder blocks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastrec.errors import ArgumentError, DtypeError
from fastrec.kernels.separable_projection import MAX_WIDTH
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.models.config import Config
from fastrec.nn._projections import PROJECTIONS, Projection

# A convolution in the feed-forward part would look beyond the lengths, which it is not given.
_ROW_BY_ROW = ("dense", "grouped", "low_rank")


@dataclass(frozen=True)
class EncoderConfig(Config):
    """Attention pattern and projections of a model's encoder blocks; by default a transformer's.

    With a dense ``projection``, a pattern changes no parameter: the state dict of a model with
    dense attention loads into one with a pattern.

    Args:
        pattern: which keys each query sees, in :class:`~fastrec.nn.WindowSparseAttention`; None
            is dense attention. In a causal model it becomes causal.
        projection: of q, k, v and the attention's output: "dense", "grouped"
            (:class:`~fastrec.nn.GroupedLinear`), "separable"
            (:class:`~fastrec.nn.SeparableProjection`) or "low_rank"
            (:class:`~fastrec.nn.LowRankLinear`).
        ffn_projection: of the feed-forward part: "dense", "grouped" or "low_rank".
        groups: of "grouped" and "separable"; divides the model's widths.
        kernel_size: of "separable"; odd, unless the model is causal.
        rank: of "low_rank"; at most the model's width.
        qk_rank: width of a head of q and k; None means d / H.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    pattern: AttentionPattern | None = None
    projection: Projection = "dense"
    ffn_projection: Projection = "dense"
    groups: int = 1
    kernel_size: int = 3
    rank: int | None = None
    qk_rank: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pattern, dict):
            try:
                object.__setattr__(self, "pattern", AttentionPattern(**self.pattern))
            except TypeError as error:
                raise ArgumentError("pattern", "an AttentionPattern's fields", error) from error
        if not isinstance(self.pattern, AttentionPattern | None):
            kind = type(self.pattern).__name__
            raise DtypeError("pattern", "an AttentionPattern or None", kind)
        for name, kinds in (("projection", PROJECTIONS), ("ffn_projection", _ROW_BY_ROW)):
            if getattr(self, name) not in kinds:
                raise ArgumentError(name, f"one of {', '.join(kinds)}", getattr(self, name))
        for name in ("groups", "kernel_size"):
            _check_positive(name, getattr(self, name))
        for name in ("rank", "qk_rank"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if "low_rank" in (self.projection, self.ffn_projection) and self.rank is None:
            raise ArgumentError("rank", "an integer with a 'low_rank' projection", None)

    def check(self, d: int, n_heads: int, ffn: int, causal: bool) -> None:
        """Checks that this fits a model.

        Args:
            d, n_heads, ffn: the model's width, heads and hidden width.
            causal: whether its blocks are.

        Raises:
            ArgumentError: it does not.
        """
        heads = None if self.pattern is None else self.pattern.heads
        if heads not in (None, n_heads):
            raise ArgumentError("pattern", f"offsets for n_heads = {n_heads}", f"{heads} lists")
        kinds = (self.projection, self.ffn_projection)
        widths = {"d": d, "ffn": ffn if self.ffn_projection == "grouped" else d}
        if self.qk_rank is not None:
            if self.qk_rank > d // n_heads:
                raise ArgumentError(
                    "qk_rank", f"at most d / n_heads = {d // n_heads}", self.qk_rank
                )
            widths["in_proj's outputs"] = 2 * n_heads * self.qk_rank + d
        if "grouped" in kinds or self.projection == "separable":
            for name, width in widths.items():
                if width % self.groups:
                    raise ArgumentError("groups", f"a divisor of {name} = {width}", self.groups)
        if "low_rank" in kinds and self.rank is not None:
            most = min(d, ffn) if self.ffn_projection == "low_rank" else d
            if self.rank > most:
                raise ArgumentError("rank", f"at most {most}", self.rank)
        looks_ahead = not causal
        size = self.kernel_size
        if self.projection == "separable" and (size > MAX_WIDTH or (looks_ahead and size % 2 == 0)):
            expected = f"1 to {MAX_WIDTH}" + ", odd where the model looks ahead" * looks_ahead
            raise ArgumentError("kernel_size", expected, size)

    def halved(self, d: int, ffn: int) -> EncoderConfig:
        """For a model of about half the width: half the ranks, and groups that divide it."""

        def half(rank: int | None) -> int | None:
            return None if rank is None else max(1, rank // 2)

        return dataclasses.replace(
            self,
            groups=math.gcd(self.groups, d, ffn),
            rank=half(self.rank),
            qk_rank=half(self.qk_rank),
        )


def as_encoder(value: Any) -> EncoderConfig:
    """``value``, or the EncoderConfig of a dict that ``to_dict`` made.

    Raises:
        DtypeError, ArgumentError: it is neither.
    """
    if isinstance(value, dict):
        return EncoderConfig.from_dict(value)
    if not isinstance(value, EncoderConfig):
        raise DtypeError("encoder", "an EncoderConfig", type(value).__name__)
    return value


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(name, "a positive integer", value)

"""Configurations of ``quantize_``: static INT8, and quantisation-aware training in two calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrec.compress.fake_quant import WEIGHT_LEVELS
from fastrec.compress.observers import METHODS
from fastrec.compress.selection import check_fraction
from fastrec.errors import ArgumentError


@dataclass(frozen=True)
class Int8:
    """Static INT8: u8 activations with calibrated ranges, s8 weights with one scale an output.

    Args:
        calibration_method: how the range of an activation is chosen from the calibration batches.
            "minmax" keeps every value; "percentile" lets what lies beyond ``percentile`` saturate;
            "mse" shrinks the range to the least squared error. The last two resist outliers.
        percentile: in (50, 100], of each side.
        embeddings: whether tables become INT8 too (one scale a row).
        levels: the largest code of a weight, 1 to 127. 127 uses all of int8. Fewer cost precision
            and no time, and the artifact stores codes by their entropy: 31 take about 5.6 bits
            each in place of 7.6.
        fuse: whether a ReLU or GELU behind a layer goes into its kernel, and layers that feed each
            other hand on uint8.
        attention: whether scores and weighted sums of attention are integers too, in
            ``WindowSparseAttention`` and the attention of ``fastrec.models``: q and k with
            calibrated ranges; v with the dynamic range of each call in the former (the paper's
            Value branch), a calibrated one in the latter, whose projections then write bytes. Not
            with QAT.
    """

    calibration_method: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    embeddings: bool = True
    fuse: bool = True
    attention: bool = False
    levels: int = WEIGHT_LEVELS

    def __post_init__(self) -> None:
        if type(self.levels) is not int or not 1 <= self.levels <= WEIGHT_LEVELS:
            raise ArgumentError("levels", f"an integer, 1 to {WEIGHT_LEVELS}", self.levels)
        if self.calibration_method not in METHODS:
            raise ArgumentError(
                "calibration_method", f"one of {METHODS}", repr(self.calibration_method)
            )
        check_fraction("percentile", self.percentile, low=50.0, high=100.000001)


@dataclass(frozen=True)
class QAT:
    """Quantisation-aware training in two calls.

    ``quantize_(model, QAT("prepare"))`` swaps in layers that round as INT8 does in the forward
    pass and train in full precision; train as usual; ``quantize_(model, QAT("convert"))`` swaps in
    the INT8 modules with the learned ranges.

    Args:
        step: "prepare" or "convert".
        averaging: weight of the newest batch in the moving average of an activation's range.
        calibration_method: for the initial ranges where ``calibration`` is passed with "prepare".
        percentile: see :class:`Int8`.
        embeddings: see :class:`Int8`.
        fuse: see :class:`Int8`.
        levels: see :class:`Int8`; of "prepare", and "convert" keeps to it.
    """

    step: Literal["prepare", "convert"] = "prepare"
    averaging: float = 0.01
    calibration_method: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    embeddings: bool = True
    fuse: bool = True
    levels: int = WEIGHT_LEVELS

    def __post_init__(self) -> None:
        if self.step not in ("prepare", "convert"):
            raise ArgumentError("step", "'prepare' or 'convert'", repr(self.step))
        check_fraction("averaging", self.averaging, high=1.000001)
        Int8(self.calibration_method, self.percentile, levels=self.levels)  # checks them

    @classmethod
    def like(cls, ranges: Int8, step: Literal["prepare", "convert"]) -> QAT:
        """QAT with the choices of a static configuration."""
        return cls(
            step,
            calibration_method=ranges.calibration_method,
            percentile=ranges.percentile,
            embeddings=ranges.embeddings,
            fuse=ranges.fuse,
            levels=ranges.levels,
        )

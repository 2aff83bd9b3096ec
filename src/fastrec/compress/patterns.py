"""Pruning configurations: the pattern of zeros, and the share pruned in each round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fastrec.compress.selection import check_count, check_fraction
from fastrec.errors import ArgumentError


@dataclass(frozen=True)
class BlockPruning:
    """How :func:`prune_` prunes.

    Args:
        sparsity: share of the selected weights to prune, in [0, 1); the paper's p = 40 %.
        block: (outputs, inputs) of one block of a linear weight. (32, 4) is what the sparse INT8
            kernel skips; multiples of it cost nothing more.
        rounds: K, prune-and-fine-tune rounds (the paper's 3).
        embedding_block: (rows, columns) of one block of an embedding table, or None to leave the
            tables dense. (1, 4) costs the artifact a quarter of a bit a weight, (1, 1) a whole one,
            and keeps more quality (docs/compression.md).
        embedding_sparsity: share of the tables' weights to prune, in [0, 1); None: ``sparsity``.
        scale: the unit in which a block's RMS is compared with others. "none": raw magnitudes, as
            the paper writes it; "output": the RMS that the weights of the same outputs had before
            the first round, so that a layer with a large fan-in (small weights throughout) or the
            weaker part of a merged projection (v beside q and k) is not emptied first;
            "balanced": the geometric mean of the two, measured best (docs/compression.md).
        max_layer_sparsity: no layer loses more than this share; None means (1 + sparsity) / 2,
            which is 0.7 at 40 %. Keeps the global sort from emptying one layer.
        frequency_power: where row counts are given to ``prune_``, a table row's blocks are weighted
            by ``(count + 1) ** frequency_power``: rows that are seldom read go first. 0.5 is the
            optimum for the squared error of what is read; smaller spreads the loss.
        scope: "global": one threshold over all layers (and one over all tables), so that weak
            layers lose more; "layer": each layer loses the same share, by a threshold of its own.
        schedule: how the share grows over the rounds: "cubic" (most in the first ones) or
            "linear". Many rounds with a few steps of fine-tuning each are gradual pruning.
        regrow: share in [0, 1) of what is kept that each round but the first gives up for pruned
            blocks whose gradients were the largest during the fine-tuning before ("RigL", Evci et
            al. 2020). They start again at zero.
    """

    sparsity: float = 0.4
    block: tuple[int, int] = (32, 4)
    rounds: int = 3
    embedding_block: tuple[int, int] | None = (1, 4)
    scale: Literal["balanced", "output", "none"] = "balanced"
    max_layer_sparsity: float | None = None
    frequency_power: float = 0.25
    scope: Literal["global", "layer"] = "global"
    schedule: Literal["cubic", "linear"] = "cubic"
    regrow: float = 0.0
    embedding_sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.embedding_sparsity is not None:
            check_fraction("embedding_sparsity", self.embedding_sparsity)
        _check_schedule(self.schedule)
        check_fraction("regrow", self.regrow)
        if self.scope not in ("global", "layer"):
            raise ArgumentError("scope", "'global' or 'layer'", repr(self.scope))
        check_fraction("sparsity", self.sparsity)
        check_count("rounds", self.rounds)
        check_fraction("frequency_power", self.frequency_power, high=4.0)
        object.__setattr__(self, "block", _block("block", self.block))
        if self.embedding_block is not None:
            pair = _block("embedding_block", self.embedding_block)
            object.__setattr__(self, "embedding_block", pair)
        if self.scale not in ("balanced", "output", "none"):
            raise ArgumentError("scale", "'balanced', 'output' or 'none'", repr(self.scale))
        if self.max_layer_sparsity is not None:
            check_fraction(
                "max_layer_sparsity", self.max_layer_sparsity, low=self.sparsity, high=1.000001
            )

    def of(self, kind: str) -> BlockPruning:
        """The configuration for "linear" or "table" weights."""
        share = self.embedding_sparsity
        if kind == "linear" or share is None:
            return self
        cap = self.max_layer_sparsity
        return replace(self, sparsity=share, max_layer_sparsity=cap and max(cap, share))

    @property
    def cap(self) -> float:
        """Largest share that one layer may lose."""
        return (
            (1 + self.sparsity) / 2 if self.max_layer_sparsity is None else self.max_layer_sparsity
        )

    def share(self, round_: int) -> float:
        """Share to be pruned after round 1..K: p_r = p (1 - (1 - r/K)^3), or p r / K.

        Cubic (Zhu & Gupta 2017, "To prune, or not to prune"): most goes in the first rounds, while
        the redundancy is largest, and the last fine-tuning repairs only a small step. At p = 0.4
        and K = 3: 28.1 %, 38.5 %, 40 %.
        """
        return self.sparsity * _progress(self.schedule, round_, self.rounds)


@dataclass(frozen=True)
class NMPruning:
    """N:M pruning: of each ``m`` neighbouring inputs of an output, the ``n`` largest weights stay.

    2:4 is what sparse tensor cores skip, and the CUDA kernel of ``sparse_int8_linear`` takes. The
    INT8 kernel of the CPU skips whole blocks and gains nothing here: use :class:`BlockPruning` for
    it. Tables are left as they are.

    Args:
        n: weights kept of each group, at least 1 and less than ``m``.
        m: neighbouring inputs that form a group; divides the inputs of every layer.
        rounds: prune-and-fine-tune rounds; each cuts the groups that lose least first.
        schedule: how the share of groups cut grows over the rounds.
        scale: see :class:`BlockPruning`; decides only which groups go first.
    """

    n: int = 2
    m: int = 4
    rounds: int = 3
    schedule: Literal["cubic", "linear"] = "cubic"
    scale: Literal["balanced", "output", "none"] = "balanced"
    cap = 1.0
    scope = "global"
    regrow = 0.0

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("m", self.m, low=2)
        check_count("rounds", self.rounds)
        _check_schedule(self.schedule)
        if self.n >= self.m:
            raise ArgumentError("n", f"less than m = {self.m}", self.n)
        if self.scale not in ("balanced", "output", "none"):
            raise ArgumentError("scale", "'balanced', 'output' or 'none'", repr(self.scale))

    def of(self, kind: str) -> NMPruning:
        """The configuration for "linear" weights, the only kind pruned here."""
        return self

    @property
    def sparsity(self) -> float:
        """Share of zeros at the end."""
        return 1 - self.n / self.m

    def share(self, round_: int) -> float:
        """Share of the groups that are cut after round 1..K."""
        return _progress(self.schedule, round_, self.rounds)


Pruning = BlockPruning | NMPruning


def _check_schedule(schedule: Any) -> None:
    if schedule not in ("cubic", "linear"):
        raise ArgumentError("schedule", "'cubic' or 'linear'", repr(schedule))


def _progress(schedule: str, round_: int, rounds: int) -> float:
    left = 1 - round_ / rounds
    return 1 - left**3 if schedule == "cubic" else 1 - left


def _block(argument: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentError(argument, "two positive integers", repr(value))
    for extent in value:
        check_count(argument, extent)
    return int(value[0]), int(value[1])

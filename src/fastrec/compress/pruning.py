"""``prune_``: the paper's dynamic-threshold pruning, on blocks that a kernel can skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastrec.compress.blocks import BlockScores, Selection, block_rms, expand_mask, select
from fastrec.compress.selection import (
    FilterFn,
    check_count,
    check_filter,
    check_fraction,
    check_model,
    named_layers,
)
from fastrec.errors import ArgumentError, DtypeError, ShapeError

MIN_BLOCKS = 64  # a smaller layer has little to win in time and, measured, much to lose in quality
MIN_TABLE_ROWS = 1000  # below: positions, behaviours, ...; nothing to win in bytes


@dataclass(frozen=True)
class BlockPruning:
    """How :func:`prune_` prunes.

    Args:
        sparsity: share of the selected weights to prune, in [0, 1); the paper's p = 40 %.
        block: (outputs, inputs) of one block of a linear weight. (32, 4) is what the sparse INT8
            kernel skips; multiples of it cost nothing more.
        rounds: K, prune-and-fine-tune rounds (the paper's 3).
        embedding_block: (rows, columns) of one block of an embedding table, or None to leave the
            tables dense. (1, 4) is what the artifact's masked codec stores compactly.
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
    """

    sparsity: float = 0.4
    block: tuple[int, int] = (32, 4)
    rounds: int = 3
    embedding_block: tuple[int, int] | None = (1, 4)
    scale: Literal["balanced", "output", "none"] = "balanced"
    max_layer_sparsity: float | None = None
    frequency_power: float = 0.25

    def __post_init__(self) -> None:
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

    @property
    def cap(self) -> float:
        """Largest share that one layer may lose."""
        return (
            (1 + self.sparsity) / 2 if self.max_layer_sparsity is None else self.max_layer_sparsity
        )

    def share(self, round_: int) -> float:
        """Share to be pruned after round 1..K: p_r = p (1 - (1 - r/K)^3).

        Cubic (Zhu & Gupta 2017, "To prune, or not to prune"): most goes in the first rounds, while
        the redundancy is largest, and the last fine-tuning repairs only a small step. At p = 0.4
        and K = 3: 28.1 %, 38.5 %, 40 %.
        """
        return self.sparsity * (1 - (1 - round_ / self.rounds) ** 3)


@dataclass(frozen=True)
class RoundReport:
    """One round: the share asked for, theta and the share reached, for linear layers and tables
    (None where the model has none that were selected)."""

    round: int
    share: float
    linear_threshold: float | None = None
    linear_sparsity: float | None = None
    table_threshold: float | None = None
    table_sparsity: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One pruned matrix: "linear" or "table", its shape and the share of its weights kept."""

    kind: str
    shape: tuple[int, int]
    kept: float


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune_` did: per round the thresholds, per layer the share kept, and overall the
    share of selected linear weights and of table weights that are pruned (None: none selected)."""

    rounds: list[RoundReport] = field(default_factory=list)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    sparsity: float | None = None
    table_sparsity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


@dataclass
class _Matrix:
    """One weight to prune, under the name of the first module that holds it."""

    name: str
    kind: str
    weight: nn.Parameter
    block: tuple[int, int]
    row_weight: Tensor | None = None
    unit: Tensor | float = 1.0
    mask: Tensor | None = None  # bool, the weight's shape

    def scores(self) -> BlockScores:
        scores = block_rms(self._weighted(), self.block)
        return BlockScores(scores.score / self.unit, scores.count)

    def fix_unit(self, scale: str) -> None:
        """Measure scores in RMS of the non-zero weights of the same outputs (tables: of the whole
        table, where the rows' norms are what tells them apart). Once: with the RMS of what is left
        after each round, a layer pruned little would look weak beside one pruned much, and be cut
        to the cap."""
        weight = self._weighted().float()
        height = self.block[0] if self.kind == "linear" else len(weight)
        panels = weight.split(height)
        sums = torch.stack([panel.square().sum() for panel in panels])
        sizes = torch.stack([(panel != 0).sum() for panel in panels])
        unit = (sums / sizes.clamp_min(1)).sqrt()
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))[:, None]
        self.unit = unit.sqrt() if scale == "balanced" else unit

    def _weighted(self) -> Tensor:
        weight = self.weight.detach()
        return weight if self.row_weight is None else weight.float() * self.row_weight[:, None]

    def apply(self) -> None:
        if self.mask is not None:
            with torch.no_grad():
                # not a product: a negative weight would become -0.0, which is not all zero bits
                self.weight.masked_fill_(~self.mask, 0.0)


FineTuneFn = Callable[[nn.Module, int], Any]


def prune_(
    model: nn.Module,
    config: BlockPruning | None = None,
    filter_fn: FilterFn | None = None,
    finetune: FineTuneFn | None = None,
    *,
    row_counts: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Prune ``model`` in place by a dynamic threshold, in K rounds with fine-tuning (paper, III-B).

    In each round r the norms of all blocks of the selected ``nn.Linear`` weights are sorted
    together, theta is chosen so that the share kept is 1 - p_r, and W <- W * M with M = [norm >=
    theta]; then ``finetune`` runs. Embedding tables are done likewise, apart from the linear
    layers. While ``finetune`` runs, gradients of pruned weights are zeroed by hooks, and the mask
    is applied again after it, so that pruned weights are exactly zero whatever the optimiser does.
    Afterwards the modules, hooks and state-dict keys are as before: the result is a plain torch
    model with exact zeros.

    A second call on the result changes nothing. Blocks that are zero already count as pruned and
    stay so.

    Args:
        model: any torch model.
        config: see :class:`BlockPruning`.
        filter_fn: (module, name) -> bool decides over ``nn.Linear`` and ``nn.Embedding`` modules.
            Default: linear layers with at least a block's outputs (32) and 64 blocks, so that a
            final 1024 -> 1 layer stays dense, and tables of at least 1000 rows.
        finetune: called as finetune(model, round) after each of the rounds 1..K.
        row_counts: table name -> how often each row is read [rows]; see ``frequency_power``.

    Raises:
        ArgumentError: nothing selected, a weight that is not finite, or a share that the per-layer
            cap forbids. The model is untouched then.
    """
    check_model(model)
    check_filter(filter_fn)
    config = BlockPruning() if config is None else config
    if not isinstance(config, BlockPruning):
        raise DtypeError("config", "a BlockPruning", type(config).__name__)
    matrices = _matrices(model, config, filter_fn or _default_filter(config))
    _attach_counts(matrices, row_counts or {}, config.frequency_power)
    if config.scale != "none":
        for matrix in matrices:
            matrix.fix_unit(config.scale)
    groups = {
        kind: [m for m in matrices if m.kind == kind]
        for kind in ("linear", "table")
        if any(m.kind == kind for m in matrices)
    }
    for kind, group in groups.items():
        _check_reachable(kind, group, config)
    rounds = []
    for round_ in range(1, config.rounds + 1):
        results = {kind: _prune_group(group, config, round_) for kind, group in groups.items()}
        if finetune is not None:
            with _masked_gradients(matrices):
                finetune(model, round_)
            for matrix in matrices:
                matrix.apply()
        rounds.append(_round_report(round_, config.share(round_), groups, results))
    return PruneReport(
        rounds=rounds,
        layers={m.name: LayerReport(m.kind, tuple(m.weight.shape), _kept(m)) for m in matrices},
        sparsity=rounds[-1].linear_sparsity,
        table_sparsity=rounds[-1].table_sparsity,
    )


def _block(argument: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentError(argument, "two positive integers", repr(value))
    for extent in value:
        check_count(argument, extent)
    return int(value[0]), int(value[1])


def _default_filter(config: BlockPruning) -> FilterFn:
    def selected(module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Embedding):
            return module.num_embeddings >= MIN_TABLE_ROWS
        rows, columns = module.weight.shape
        n_blocks = -(-rows // config.block[0]) * -(-columns // config.block[1])
        return rows >= config.block[0] and n_blocks >= MIN_BLOCKS

    return selected


def _matrices(model: nn.Module, config: BlockPruning, filter_fn: FilterFn) -> list[_Matrix]:
    found: dict[int, _Matrix] = {}  # a tied weight is pruned once, as what it is met as first
    for name, module in named_layers(model, nn.Linear, filter_fn):
        found.setdefault(
            id(module.weight), _Matrix(f"{name}.weight", "linear", module.weight, config.block)
        )
    if config.embedding_block is not None:
        for name, module in named_layers(model, nn.Embedding, filter_fn):
            found.setdefault(
                id(module.weight),
                _Matrix(f"{name}.weight", "table", module.weight, config.embedding_block),
            )
    if not found:
        raise ArgumentError(
            "model",
            "nn.Linear layers (or tables) that filter_fn selects; by default those with at least "
            f"{config.block[0]} outputs and {MIN_BLOCKS} blocks",
            "none",
        )
    for matrix in found.values():
        if not bool(torch.isfinite(matrix.weight).all()):
            raise ArgumentError(matrix.name, "finite weights", "NaN or infinity")
    return list(found.values())


def _attach_counts(
    matrices: Sequence[_Matrix], row_counts: Mapping[str, Any], power: float
) -> None:
    tables = {m.name.removesuffix(".weight"): m for m in matrices if m.kind == "table"}
    for name, counts in row_counts.items():
        if name not in tables:
            raise ArgumentError("row_counts", f"names among {sorted(tables)}", repr(name))
        matrix = tables[name]
        if not isinstance(counts, Tensor):
            counts = torch.tensor(np.asarray(counts, dtype=np.float32))  # a copy: may be read-only
        counts = counts.to(matrix.weight.device, torch.float32)
        if counts.shape != matrix.weight.shape[:1]:
            raise ShapeError(
                f"row_counts[{name!r}]", f"[{matrix.weight.shape[0]}]", list(counts.shape)
            )
        if not bool((counts >= 0).all()):
            raise ArgumentError(f"row_counts[{name!r}]", "counts >= 0", "negative or NaN counts")
        matrix.row_weight = (counts + 1) ** power


def _check_reachable(kind: str, group: Sequence[_Matrix], config: BlockPruning) -> None:
    """The last round tried without touching a weight, so that a share out of reach changes
    nothing."""
    scores = [m.scores() for m in group]
    total = sum(s.elements for s in scores)
    largest = max(int(s.count.max()) for s in scores)
    reached = select(scores, config.sparsity, config.cap).pruned_elements
    if reached + largest < config.sparsity * total:
        raise ArgumentError(
            "sparsity",
            f"at most {reached / total:.3f}: with blocks of {group[0].block} no {kind} "
            f"weight may lose more than {config.cap:.2f} of its elements (max_layer_sparsity)",
            config.sparsity,
        )


def _prune_group(group: Sequence[_Matrix], config: BlockPruning, round_: int) -> Selection:
    scores = [m.scores() for m in group]
    total = sum(s.elements for s in scores)
    # Zeros that are there already stay pruned through the early rounds of a repeated call.
    zero = sum(int(s.count[s.score == 0].sum()) for s in scores)
    share = min(max(config.share(round_), zero / total), config.sparsity)
    selection = select(scores, share, config.cap)
    for matrix, keep in zip(group, selection.keep, strict=True):
        matrix.mask = expand_mask(keep, tuple(matrix.weight.shape), matrix.block)
        matrix.apply()
    return selection


@contextmanager
def _masked_gradients(matrices: Sequence[_Matrix]) -> Iterator[None]:
    """Zero the gradients of pruned weights, so that no momentum builds up behind the mask."""

    def hook_for(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient * mask

    handles = [
        m.weight.register_hook(hook_for(m.mask))
        for m in matrices
        if m.mask is not None and m.weight.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(matrix: _Matrix) -> float:
    return float(matrix.mask.float().mean()) if matrix.mask is not None else 1.0


def _round_report(
    round_: int,
    share: float,
    groups: Mapping[str, Sequence[_Matrix]],
    results: Mapping[str, Selection],
) -> RoundReport:
    values: dict[str, float] = {}
    for kind, result in results.items():
        elements = sum(m.weight.numel() for m in groups[kind])
        values[f"{kind}_threshold"] = result.threshold
        values[f"{kind}_sparsity"] = result.pruned_elements / elements
    return RoundReport(round_, share, **values)

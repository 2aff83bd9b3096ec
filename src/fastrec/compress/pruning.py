"""``prune_``: the paper's dynamic-threshold pruning, in blocks that kernels can skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrec.compress.blocks import Selection, select
from fastrec.compress.layers import (
    block_within_groups,
    computes_linear,
    weight_name,
    weight_obstacle,
    weight_of,
)
from fastrec.compress.masking import Matrix, NMMatrix, choose, masked_gradients
from fastrec.compress.patterns import BlockPruning, NMPruning, Pruning
from fastrec.compress.selection import (
    FilterFn,
    Layers,
    as_filter,
    check_model,
    is_table,
    named_layers,
    reasons,
)
from fastrec.errors import ArgumentError, DtypeError, ShapeError

MIN_BLOCKS = 64  # smaller layers gain little time and, measured, lose much quality
LARGEST = 1e16  # the squares of a block's weights are summed in float32
MIN_TABLE_ROWS = 1000  # smaller tables (positions, behaviours) save no bytes


@dataclass(frozen=True)
class RoundReport:
    """One round: the share asked for (of linear layers), theta and the share reached, for linear
    layers and tables (None where the model has none that were selected)."""

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
    """Result of :func:`prune_`: per round the thresholds, per layer the share kept, and overall the
    share of selected linear weights and of table weights that are pruned (None: none selected).
    ``left`` names the selected layers that could not be pruned, with the reason."""

    rounds: list[RoundReport] = field(default_factory=list)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    sparsity: float | None = None
    table_sparsity: float | None = None
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


FineTuneFn = Callable[[nn.Module, int], Any]


def prune_(
    model: nn.Module,
    config: Pruning | None = None,
    filter_fn: Layers | None = None,
    finetune: FineTuneFn | None = None,
    *,
    row_counts: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Prune ``model`` in place by a dynamic threshold, in K rounds with fine-tuning (paper, III-B).

    In each round r the norms of all blocks of the selected ``nn.Linear`` weights are sorted
    together, theta is chosen so that the share kept is 1 - p_r, and W <- W * M with M = [norm >=
    theta]; then ``finetune`` runs. Embedding tables are done likewise, apart from the linear
    layers. While ``finetune`` runs, gradients of pruned weights are zeroed by hooks, and the mask
    is applied again after it, so that pruned weights are exactly zero with every optimiser.
    Afterwards the modules, hooks and state-dict keys are as before: the result is a plain torch
    model with exact zeros.

    A second call on the result changes nothing. Blocks that are zero already count as pruned and
    stay so.

    Args:
        model: any torch model.
        config: a :class:`BlockPruning` or an :class:`NMPruning`.
        filter_fn: which linear layers (``nn.Linear``, ``GroupedLinear``, ``SeparableProjection``),
            attention (``nn.MultiheadAttention``: its weight for q, k and v) and tables: names of
            layers (or of modules: all layers inside), compiled regular expressions that match full
            names, or (module, name) -> bool, which is not asked of attention.
            Default: layers with at least a block's outputs (32) and 64 blocks, so that a final
            1024 -> 1 layer stays dense, and tables of at least 1000 rows.
        finetune: called as finetune(model, round) after each of the rounds 1..K.
        row_counts: table name -> how often each row is read [rows]; see ``frequency_power``.

    Raises:
        ArgumentError: a name that no layer has, nothing selected, a block that does not divide a
            layer chosen by name, a layer chosen by name whose weight is re-parametrised, a weight
            that is not finite, or a share that the per-layer cap
            forbids. The model is untouched then, and also where ``finetune`` raises.
    """
    given, model = model, check_model(model)
    by_name = filter_fn is not None and not callable(filter_fn)
    # A caller's function is asked of layers and tables alone, as it always was.
    kinds = (computes_linear,) if callable(filter_fn) else (computes_linear, _projects)
    filter_fn = as_filter(model, filter_fn, lambda m: is_table(m) or any(k(m) for k in kinds))
    config = BlockPruning() if config is None else config
    if not isinstance(config, BlockPruning | NMPruning):
        raise DtypeError("config", "a BlockPruning or an NMPruning", type(config).__name__)
    matrices, left = _matrices(model, config, filter_fn or _default_filter(config), kinds)
    if by_name and left:
        name, why = next(iter(left.items()))
        raise ArgumentError("filter_fn", "layers that can be pruned", f"{name!r}: {why}")
    if by_name or isinstance(config, NMPruning):
        _check_blocks(matrices)
    if isinstance(config, BlockPruning):
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
        _check_reachable(kind, group, config.of(kind))
    rounds = []
    with _untouched_on_failure(model, matrices, trains=finetune is not None):
        for round_ in range(1, config.rounds + 1):
            results = {
                kind: choose(
                    group,
                    share=config.of(kind).share(round_),
                    goal=config.of(kind).share(config.rounds),
                    cap=config.of(kind).cap,
                    by_layer=config.scope == "layer",
                    regrow=config.regrow,
                )
                for kind, group in groups.items()
            }
            if finetune is not None:
                with masked_gradients(matrices, watch=config.regrow > 0):
                    finetune(given, round_)
                for matrix in matrices:
                    matrix.apply()
            rounds.append(_round_report(round_, config.share(round_), groups, results))
    return PruneReport(
        rounds=rounds,
        layers={m.name: LayerReport(m.kind, tuple(m.weight.shape), _kept(m)) for m in matrices},
        sparsity=rounds[-1].linear_sparsity,
        table_sparsity=rounds[-1].table_sparsity,
        left=left,
    )


@contextmanager
def _untouched_on_failure(
    model: nn.Module, matrices: Sequence[Matrix], trains: bool
) -> Iterator[None]:
    """Put every tensor and training flag back where the block raises."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)] if trains else []
    tensors = tensors or [m.weight.detach() for m in matrices]
    before = [t.clone() for t in tensors]
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for module, flag in flags.items():
            module.training = flag
        raise


def _default_filter(config: Pruning) -> FilterFn:
    def selected(module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Embedding):
            return module.num_embeddings >= MIN_TABLE_ROWS
        weight = weight_of(module)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return True
        rows, columns = weight.flatten(0, -2).shape
        if isinstance(config, NMPruning):
            return rows >= 32 and columns % config.m == 0
        n_blocks = -(-rows // config.block[0]) * -(-columns // config.block[1])
        return rows >= config.block[0] and n_blocks >= MIN_BLOCKS

    return selected


def _projects(module: nn.Module) -> bool:
    """Whether it is torch's attention with one weight [3d, d] for q, k and v."""
    return isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim


def _matrices(
    model: nn.Module,
    config: Pruning,
    filter_fn: FilterFn,
    kinds: Sequence[Callable[[nn.Module], bool]],
) -> tuple[list[Matrix], dict[str, str]]:
    """The weights to prune, and the layers whose weight cannot be, with the reason."""
    found: dict[int, Matrix] = {}  # a tied weight is pruned once, as what it is met as first
    left: dict[str, str] = {}

    def prunable(module: nn.Module, name: str) -> bool:
        chosen = filter_fn(module, name)
        why = weight_obstacle(module) if chosen else None
        if why is not None:
            left[name] = why
        return chosen and why is None

    for name, module in named_layers(model, lambda m: any(k(m) for k in kinds), prunable):
        weight, full_name = weight_of(module), f"{name}.{weight_name(module)}"
        if isinstance(config, NMPruning):
            pattern = (1, config.m)
            matrix: Matrix = NMMatrix(full_name, "linear", weight, pattern, keep=config.n)
        else:
            block = block_within_groups(weight, config.block)
            matrix = Matrix(full_name, "linear", weight, block)
        found.setdefault(id(weight), matrix)
    if isinstance(config, BlockPruning) and config.embedding_block is not None:
        for name, module in named_layers(model, is_table, prunable):
            weight = weight_of(module)
            found.setdefault(
                id(weight), Matrix(f"{name}.weight", "table", weight, config.embedding_block)
            )
    if not found:
        raise ArgumentError(
            "model",
            "linear layers (or tables) that filter_fn selects; by default those with at least a "
            f"block's outputs and {MIN_BLOCKS} blocks",
            reasons(left) or "none",
        )
    for matrix in found.values():
        if not bool((matrix.weight.detach().abs() < LARGEST).all()):
            raise ArgumentError(
                matrix.name, f"finite weights below {LARGEST:g}", "NaN, infinity or larger ones"
            )
    return list(found.values()), left


def _check_blocks(matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        rows, columns = matrix.rows.shape
        high, wide = matrix.block
        if rows % high or columns % wide:
            fits = (math.gcd(rows, high), math.gcd(columns, wide))
            raise ArgumentError(
                "config",
                f"blocks that divide {matrix.name} ({rows} x {columns}), such as {fits}, or a "
                "function in place of names, for blocks cut off at the edges",
                f"{high} x {wide}",
            )


def _attach_counts(matrices: Sequence[Matrix], row_counts: Mapping[str, Any], power: float) -> None:
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


def _check_reachable(kind: str, group: Sequence[Matrix], config: Pruning) -> None:
    """The last round tried without touching a weight, so that a share out of reach changes
    nothing."""
    scores = [m.scores() for m in group]
    total = sum(s.elements for s in scores)
    largest = max(int(s.count.max()) for s in scores)
    share = config.share(config.rounds)
    reached = select(scores, share, config.cap).pruned_elements
    if reached + largest < share * total:
        raise ArgumentError(
            "sparsity",
            f"at most {reached / total:.3f}: with blocks of {group[0].block} no {kind} "
            f"weight may lose more than {config.cap:.2f} of its elements (max_layer_sparsity)",
            config.sparsity,
        )


def _kept(matrix: Matrix) -> float:
    return float(matrix.mask.float().mean()) if matrix.mask is not None else 1.0


def _round_report(
    round_: int,
    share: float,
    groups: Mapping[str, Sequence[Matrix]],
    results: Mapping[str, Selection],
) -> RoundReport:
    values: dict[str, float | None] = {}
    for kind, result in results.items():
        elements = sum(m.weight.numel() for m in groups[kind])
        # Every group of an N:M pattern is cut in the end: then nothing is above the threshold.
        finite = math.isfinite(result.threshold)
        values[f"{kind}_threshold"] = result.threshold if finite else None
        values[f"{kind}_sparsity"] = result.pruned_elements / elements
    return RoundReport(round_, share, **values)

"""Choices for each layer of a model, and how a model with chosen layers is made."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastrec.compress.layers import computes_linear, weight_of
from fastrec.compress.patterns import BlockPruning
from fastrec.compress.pruning import MIN_BLOCKS, MIN_TABLE_ROWS, prune_
from fastrec.compress.quantization import MIN_OUTPUTS, Int8, quantize_, unsupported
from fastrec.compress.replacement import Grouped, LowRank, WindowSparse, replace_
from fastrec.compress.selection import (
    FilterFn,
    Layers,
    as_filter,
    bypassed_children,
    check_count,
    check_fraction,
    is_table,
)
from fastrec.errors import ArgumentError, DtypeError
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

Train = Callable[[nn.Module], Any]
_STEP = 8  # ranks are multiples of it: a thin layer's outputs fill half a register


@dataclass(frozen=True)
class Choice:
    """One choice for a layer; the default leaves it as it is.

    Args:
        precision: "fp32" or "int8", of weights and input.
        sparsity: share of the weights pruned, in blocks that the kernel skips.
        rank: of a low-rank layer, as a share of the full rank, or None.
        groups: of a grouped layer; 1 is a dense one.
        pattern: who attends whom, of an attention; None is the attention as it is.
    """

    precision: Literal["fp32", "int8"] = "fp32"
    sparsity: float = 0.0
    rank: float | None = None
    groups: int = 1
    pattern: AttentionPattern | None = None

    @property
    def structure(self) -> Choice:
        """This choice without what pruning and rounding do."""
        return dataclasses.replace(self, precision="fp32", sparsity=0.0)

    @property
    def name(self) -> str:
        """Such as "int8, 40 % pruned"; "fp32" for the layer as it is."""
        parts: list[str] = [self.precision]
        if self.sparsity:
            parts.append(f"{self.sparsity:.0%} pruned".replace("%", " %"))
        if self.rank is not None:
            parts.append(f"rank {self.rank:g}")
        if self.groups > 1:
            parts.append(f"{self.groups} groups")
        if self.pattern is not None:
            parts.append(f"window {self.pattern.window} + {self.pattern.offsets}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Unit:
    """A layer that choices are made for: its name in the model, its kind ("linear", "table" or
    "attention") and its choices, the first of which leaves it as it is."""

    name: str
    kind: str
    choices: tuple[Choice, ...]


Chosen = Mapping[str, Choice]


@dataclass(frozen=True)
class Space:
    """The choices that are searched; each layer has those that fit it.

    Linear layers: every precision with every sparsity, rank and number of groups (one of the three
    at a time). Tables: precision and sparsity. Self-attention: windows with offsets; with torch's
    ``nn.MultiheadAttention``, whose projections are part of it, also the precision of those.

    Args:
        precisions: "fp32", "int8" or both.
        sparsities: shares of weights to prune, each in [0, 1).
        ranks: shares of the full rank, each in (0, 1).
        groups: numbers of groups, each at least 2.
        windows: of :class:`~fastrec.AttentionPattern`.
        offsets: likewise; combined with each window.
        filter_fn: which layers; names, regular expressions or a function, see ``prune_``.

    Raises:
        ArgumentError: a value outside what is written above.
    """

    precisions: tuple[str, ...] = ("fp32", "int8")
    sparsities: tuple[float, ...] = (0.0, 0.4, 0.6, 0.75)
    ranks: tuple[float, ...] = (0.5, 0.25)
    groups: tuple[int, ...] = (2, 4)
    windows: tuple[int, ...] = (4, 16)
    offsets: tuple[Any, ...] = ("none", "log2")
    filter_fn: Layers | None = None

    def __post_init__(self) -> None:
        for name in ("precisions", "sparsities", "ranks", "groups", "windows", "offsets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for precision in self.precisions:
            if precision not in ("fp32", "int8"):
                raise ArgumentError("precisions", "'fp32' and 'int8'", repr(precision))
        for sparsity in self.sparsities:
            check_fraction("sparsities", sparsity)
        for rank in self.ranks:
            check_fraction("ranks", rank, low=1e-6)
        for count in self.groups:
            check_count("groups", count, low=2)
        for window in self.windows:
            check_count("windows", window, low=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; of a ``filter_fn`` only whether there is one."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"filter_fn": None if self.filter_fn is None else "given"}

    @classmethod
    def from_dict(cls, values: Any) -> Space:
        """Of the fields as plain JSON types; what is absent takes its default.

        Raises:
            ArgumentError: an unknown key or a bad value.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not values.keys() <= set(names):
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ArgumentError("space", f"keys among {names}", got)
        return cls(**values)

    def units(self, model: nn.Module) -> tuple[list[Unit], dict[str, str]]:
        """The layers that have a choice, in the order of the tree; and the name of each other one
        that does work, with the reason why it has none.

        Raises:
            ArgumentError: no layer has a choice.
        """
        chosen = as_filter(model, self.filter_fn, _is_layer)
        left = unsupported(model, embeddings=True)
        bypassed = bypassed_children(model)
        units: list[Unit] = []
        for name, module in model.named_modules():
            hidden = id(module) in bypassed and not _attends(module)
            if not _is_layer(module) or hidden or not name:
                continue
            kind, choices = self._choices(module)
            if chosen is not None and not chosen(module, name):
                left[name] = "left out by filter_fn"
            elif len(choices) > 1:
                units.append(Unit(name, kind, tuple(choices)))
                left.pop(name, None)
            else:
                left.setdefault(name, _why_none(module))
        # Layers inside a unit are part of its choice.
        whole = tuple(f"{u.name}." for u in units if u.kind == "attention")
        left = {name: why for name, why in left.items() if not name.startswith(whole)}
        if not units:
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items()) or "no layer"
            raise ArgumentError("model", "layers that have a choice", reasons)
        return units, left

    def _choices(self, module: nn.Module) -> tuple[str, list[Choice]]:
        as_it_is = Choice()
        if _attends(module):
            return "attention", [as_it_is, *self._patterns(module)]
        if is_table(module):
            choices = self._weights() if len(weight_of(module)) >= MIN_TABLE_ROWS else []
            return "table", _first(as_it_is, choices)
        weight = weight_of(module)
        rows, columns = weight.flatten(0, -2).shape
        if rows < MIN_OUTPUTS:
            return "linear", [as_it_is]
        prunes = rows >= 32 and -(-rows // 32) * -(-columns // 4) >= MIN_BLOCKS
        choices = self._weights(prunes)
        for structure in self._structures(module):
            choices += [dataclasses.replace(structure, precision=p) for p in self._precisions]
        return "linear", _first(as_it_is, choices)

    @property
    def _precisions(self) -> tuple[Any, ...]:
        return self.precisions

    def _weights(self, prunes: bool = True) -> list[Choice]:
        shares = [s for s in self.sparsities if prunes or s == 0]
        return [Choice(precision=p, sparsity=s) for p in self._precisions for s in shares]

    def _structures(self, module: nn.Module) -> list[Choice]:
        if type(module) is not nn.Linear:
            return []
        shares = (s for s in self.ranks if not LowRank(rank_of(module, s)).obstacle(module))
        counts = (n for n in self.groups if not Grouped(n).obstacle(module))
        return [*(Choice(rank=s) for s in shares), *(Choice(groups=n) for n in counts)]

    def _patterns(self, module: nn.Module) -> list[Choice]:
        if WindowSparse().obstacle(module) is not None:
            return []
        inside = isinstance(module, nn.MultiheadAttention)
        return [
            Choice(precision=p, pattern=AttentionPattern(window=w, offsets=o))
            for p in (self._precisions if inside else ("fp32",))
            for w in self.windows
            for o in self.offsets
        ]


def _first(as_it_is: Choice, choices: Iterable[Choice]) -> list[Choice]:
    return [as_it_is, *(c for c in choices if c != as_it_is)]


def _attends(module: nn.Module) -> bool:
    return WindowSparse().can(module)


def _is_layer(module: nn.Module) -> bool:
    return computes_linear(module) or is_table(module) or _attends(module)


def _why_none(module: nn.Module) -> str:
    if is_table(module):
        return f"a table of fewer than {MIN_TABLE_ROWS} rows"
    if _attends(module):
        return WindowSparse().obstacle(module) or "no window in the space"
    if len(weight_of(module).flatten(0, -2)) < MIN_OUTPUTS:
        return f"fewer than {MIN_OUTPUTS} outputs"
    return "no choice in the space fits it"


def rank_of(linear: nn.Module, share: float) -> int:
    """The rank that a share of the full one means for this layer."""
    full = min(weight_of(linear).shape)
    return min(full, max(_STEP, round(share * full / _STEP) * _STEP))


def check_choices(model: nn.Module, chosen: Chosen) -> None:
    """DtypeError or ArgumentError where ``chosen`` is no mapping of this model's layers."""
    names = dict(model.named_modules())
    for name, choice in chosen.items():
        if not isinstance(choice, Choice):
            raise DtypeError("chosen", "layer name -> Choice", type(choice).__name__)
        if name not in names:
            raise ArgumentError("chosen", "names of layers", repr(name))


def restructured(model: nn.Module, chosen: Chosen) -> nn.Module:
    """A copy of ``model`` in eval mode with low-rank, grouped and window-sparse layers put in."""
    check_choices(model, chosen)
    new = copy.deepcopy(model).eval()
    configs: dict[Any, list[str]] = {}
    for name, choice in chosen.items():
        config: LowRank | Grouped | WindowSparse
        if choice.rank is not None:
            config = LowRank(rank_of(new.get_submodule(name), choice.rank))
        elif choice.groups > 1:
            config = Grouped(choice.groups)
        elif choice.pattern is not None:
            config = WindowSparse(choice.pattern)
        else:
            continue
        configs.setdefault(config, []).append(name)
    for config, names in configs.items():
        replace_(new, config, _only(names))
    return new


def pruned_(model: nn.Module, chosen: Chosen, train: Train | None = None) -> None:
    """Prune to the chosen sparsities, in place; while ``train`` runs, pruned weights stay zero.

    Weights that are pruned already stay zero: a second call continues the training.
    """
    shares: dict[float, list[str]] = {}
    for name, choice in chosen.items():
        if choice.sparsity:
            shares.setdefault(choice.sparsity, []).append(name)

    def nested(left: list[float]) -> None:
        # Each share's masks hold while those inside are made and trained.
        if left:
            config = BlockPruning(left[0], rounds=1, scope="layer")
            prune_(model, config, _only(shares[left[0]]), lambda m, r: nested(left[1:]))
        elif train is not None:
            train(model)

    nested(sorted(shares))


def quantised_(model: nn.Module, chosen: Chosen, calibration: Iterable[Any], config: Int8) -> None:
    """Static INT8 for the layers that are to have it, in place."""
    names = [name for name, choice in chosen.items() if choice.precision == "int8"]
    if names:
        quantize_(model, config, calibration, _only(names))


def _only(names: Iterable[str]) -> FilterFn:
    """The named layers and what is inside them."""
    known = set(names)

    def selected(module: nn.Module, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in known for i in range(1, len(parts) + 1))

    return selected

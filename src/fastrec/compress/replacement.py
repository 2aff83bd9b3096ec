"""``replace_``: replace trained layers by cheaper ones, in any torch model."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastrec.compress.layers import swap_obstacle
from fastrec.compress.selection import (
    Layers,
    as_filter,
    bypassed_children,
    check_count,
    check_model,
    reasons,
    set_module,
)
from fastrec.errors import ArgumentError, DtypeError
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.models import SASRec
from fastrec.models.attention import SelfAttention
from fastrec.nn import GroupedLinear, LowRankLinear, WindowSparseAttention


class _Replacement:
    """One kind of layer, and the cheaper one in its place."""

    def can(self, module: nn.Module) -> bool:
        """Whether ``module`` is of a class that is replaced; here ``nn.Linear``."""
        return type(module) is nn.Linear

    def obstacle(self, module: Any) -> str | None:
        """Why this module is not replaced, or None."""
        raise NotImplementedError

    def make(self, module: Any, causal: bool) -> nn.Module:
        """The module that replaces it."""
        raise NotImplementedError


@dataclass(frozen=True)
class LowRank(_Replacement):
    """``nn.Linear`` -> ``LowRankLinear`` of ``rank``, by SVD; where that is cheaper."""

    rank: int

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    def obstacle(self, module: Any) -> str | None:
        inputs, outputs = module.in_features, module.out_features
        if self.rank * (inputs + outputs) >= inputs * outputs:
            return f"rank {self.rank} is no cheaper than {outputs} x {inputs}"
        return None

    def make(self, module: Any, causal: bool) -> nn.Module:
        return LowRankLinear.from_float(module, self.rank)


@dataclass(frozen=True)
class Grouped(_Replacement):
    """``nn.Linear`` -> ``GroupedLinear``, its diagonal blocks: a start for fine-tuning."""

    groups: int
    shuffle: bool = False

    def __post_init__(self) -> None:
        check_count("groups", self.groups, low=2)

    def obstacle(self, module: Any) -> str | None:
        if module.in_features % self.groups or module.out_features % self.groups:
            return (
                f"{self.groups} groups do not divide {module.out_features} x {module.in_features}"
            )
        return None

    def make(self, module: Any, causal: bool) -> nn.Module:
        return GroupedLinear.from_float(module, self.groups, shuffle=self.shuffle)


@dataclass(frozen=True)
class WindowSparse(_Replacement):
    """``nn.MultiheadAttention`` and the models' own ``SelfAttention`` -> ``WindowSparseAttention``.

    Args:
        pattern: who sees whom; causal where the model's attention is (in a ``SASRec`` it is made
            so).
        qk_rank: width of a head of q and k, by SVD; of ``nn.MultiheadAttention`` only.
    """

    pattern: AttentionPattern = field(default_factory=lambda: AttentionPattern(window=16))
    qk_rank: int | None = None

    def can(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention | SelfAttention)

    def obstacle(self, module: Any) -> str | None:
        if isinstance(module, SelfAttention):
            return None if self.qk_rank is None else "qk_rank is a matter of its EncoderConfig"
        if not module._qkv_same_embed_dim:
            return "kdim or vdim differ from embed_dim"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv or add_zero_attn: a key without a position fits no pattern"
        return None

    def make(self, module: Any, causal: bool) -> nn.Module:
        pattern = dataclasses.replace(self.pattern, causal=True) if causal else self.pattern
        if isinstance(module, nn.MultiheadAttention):
            return WindowSparseAttention.from_mha(module, pattern, qk_rank=self.qk_rank)
        width = module.n_heads * module.head_dim
        narrow = None if module.qk_dim == module.head_dim else module.qk_dim
        with torch.device("meta"):
            new = WindowSparseAttention(width, module.n_heads, pattern=pattern, qk_rank=narrow)
        new.in_proj, new.out_proj = module.in_proj, module.out_proj
        return new.train(module.training)


Replacement = LowRank | Grouped | WindowSparse


@dataclass(frozen=True)
class ReplaceReport:
    """Result of :func:`replace_`: the layers replaced, those that were not with the reason, and the
    number of parameters before and after."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


def replace_(
    model: nn.Module, config: Replacement, filter_fn: Layers | None = None
) -> ReplaceReport:
    """Replace trained layers by cheaper ones in place, starting from their weights.

    A replaced layer is an approximation: fine-tune or distil afterwards. The module tree's names
    stay.

    Args:
        model: any torch model.
        config: :class:`LowRank`, :class:`Grouped` or :class:`WindowSparse`.
        filter_fn: which layers; see :func:`~fastrec.compress.prune_`. Default: all of the kind.

    Raises:
        DtypeError: another config.
        ArgumentError: a name that no layer has, or nothing could be replaced (the message holds the
            reasons). The model is untouched then.
    """
    model = check_model(model)
    if not isinstance(config, LowRank | Grouped | WindowSparse):
        raise DtypeError("config", "a LowRank, a Grouped or a WindowSparse", type(config).__name__)
    chosen = as_filter(model, filter_fn, config.can)
    before = sum(p.numel() for p in model.parameters())
    bypassed, causal = bypassed_children(model), isinstance(model, SASRec)
    attention = isinstance(config, WindowSparse)
    swaps: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not config.can(module) or (chosen is not None and not chosen(module, name)):
            continue
        reason = config.obstacle(module)
        if not attention and id(module) in bypassed:
            reason = "its parent reads its weight without calling it"
        if reason is None:
            reason = swap_obstacle(module)
        if not name:
            reason = "it is the model itself: wrap it in nn.Sequential"
        if reason is None:
            swaps[name] = config.make(module, causal)
        else:
            left[name] = reason
    if not swaps:
        raise ArgumentError(
            "model", "layers that can be replaced", reasons(left) or "no such layer"
        )
    for name, module in swaps.items():
        set_module(model, name, module)
    after = sum(p.numel() for p in model.parameters())
    kinds = {name: type(module).__name__ for name, module in swaps.items()}
    return ReplaceReport(kinds, left, (before, after))

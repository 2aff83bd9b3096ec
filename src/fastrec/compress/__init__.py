"""Make a trained torch model smaller and faster: prune, quantise, distil, save.

Light to import: torch loads on first use of a name (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "replace_": "replacement",
    "WindowSparse": "replacement",
    "ReplaceReport": "replacement",
    "LowRank": "replacement",
    "Grouped": "replacement",
    "AttentionMapKL": "distillation",
    "BlockPruning": "pruning",
    "DistillReport": "distillation",
    "Distillation": "recipe",
    "FineTune": "recipe",
    "HardLabel": "distillation",
    "HiddenStates": "distillation",
    "Int8": "quantization",
    "LogitKL": "distillation",
    "NMPruning": "pruning",
    "PruneReport": "pruning",
    "QAT": "quantization",
    "QuantizeReport": "quantization",
    "Recipe": "recipe",
    "artifact_bytes": "artifact",
    "distill": "distillation",
    "distillation_loss": "distillation",
    "load": "artifact",
    "prune_": "pruning",
    "quantize_": "quantization",
    "read_manifest": "artifact",
    "SensitivityReport": "layer_sensitivity",
    "save": "artifact",
    "sensitivity": "layer_sensitivity",
    "student": "shrinking",
}

if TYPE_CHECKING:
    from fastrec.compress.artifact import artifact_bytes, load, read_manifest, save
    from fastrec.compress.distillation import (
        AttentionMapKL,
        DistillReport,
        HardLabel,
        HiddenStates,
        LogitKL,
        distill,
        distillation_loss,
    )
    from fastrec.compress.layer_sensitivity import SensitivityReport, sensitivity
    from fastrec.compress.pruning import BlockPruning, NMPruning, PruneReport, prune_
    from fastrec.compress.quantization import QAT, Int8, QuantizeReport, quantize_
    from fastrec.compress.recipe import Distillation, FineTune, Recipe
    from fastrec.compress.replacement import (
        Grouped,
        LowRank,
        ReplaceReport,
        WindowSparse,
        replace_,
    )
    from fastrec.compress.shrinking import student

__all__ = [
    "QAT",
    "AttentionMapKL",
    "BlockPruning",
    "DistillReport",
    "Distillation",
    "FineTune",
    "Grouped",
    "HardLabel",
    "HiddenStates",
    "Int8",
    "LogitKL",
    "LowRank",
    "NMPruning",
    "PruneReport",
    "QuantizeReport",
    "Recipe",
    "ReplaceReport",
    "SensitivityReport",
    "WindowSparse",
    "artifact_bytes",
    "distill",
    "distillation_loss",
    "load",
    "prune_",
    "quantize_",
    "read_manifest",
    "replace_",
    "save",
    "sensitivity",
    "student",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = importlib.import_module(f"fastrec.compress.{_EXPORTS[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'fastrec.compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

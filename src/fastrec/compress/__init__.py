"""Make a trained torch model smaller and faster: prune, quantise, distil, save.

Light to import: torch loads on first use of a name (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".artifact": ("artifact_bytes", "load", "read_manifest", "save"),
        ".distillation": (
            "AttentionMapKL",
            "DistillReport",
            "HardLabel",
            "HiddenStates",
            "LogitKL",
            "distill",
            "distillation_loss",
        ),
        ".layer_sensitivity": ("SensitivityReport", "sensitivity"),
        ".pruning": ("BlockPruning", "NMPruning", "PruneReport", "prune_"),
        ".quantization": ("Int8", "QAT", "QuantizeReport", "quantize_"),
        ".recipe": ("Distillation", "FineTune", "Recipe"),
        ".replacement": ("Grouped", "LowRank", "ReplaceReport", "WindowSparse", "replace_"),
        ".shrinking": ("student",),
    },
)

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

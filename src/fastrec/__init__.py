"""fastrec: custom-kernel acceleration for real-time sequential recommenders.

``import fastrec`` is light: it loads neither torch nor the compiled kernels, and has no side
effect. The names below are resolved on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "HiddenStates": "fastrec.compress",
    "replace_": "fastrec.compress",
    "WindowSparse": "fastrec.compress",
    "LowRank": "fastrec.compress",
    "Grouped": "fastrec.compress",
    "Budget": "fastrec.search",
    "autotune": "fastrec.search",
    "AttentionPattern": "fastrec.kernels.window_sparse_attention.pattern",
    "BlockPruning": "fastrec.compress",
    "Int8": "fastrec.compress",
    "QAT": "fastrec.compress",
    "Recipe": "fastrec.compress",
    "compile": "fastrec.runtime",
    "distill": "fastrec.compress",
    "export": "fastrec.exporters",
    "NMPruning": "fastrec.compress",
    "load": "fastrec.compress",
    "prune_": "fastrec.compress",
    "quantize_": "fastrec.compress",
    "save": "fastrec.compress",
    "sensitivity": "fastrec.compress",
    "student": "fastrec.compress",
}
_ROOMS = (
    "compress",
    "data",
    "errors",
    "exporters",
    "kernels",
    "measure",
    "models",
    "nn",
    "report",
    "runtime",
    "serving",
    "train",
    "search",
)

if TYPE_CHECKING:
    from fastrec import (
        compress,
        data,
        errors,
        exporters,
        kernels,
        measure,
        models,
        nn,
        report,
        runtime,
        search,
        serving,
        train,
    )
    from fastrec.compress import (
        QAT,
        BlockPruning,
        Grouped,
        HiddenStates,
        Int8,
        LowRank,
        NMPruning,
        Recipe,
        WindowSparse,
        distill,
        load,
        prune_,
        quantize_,
        replace_,
        save,
        sensitivity,
        student,
    )
    from fastrec.exporters import export
    from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
    from fastrec.runtime import compile
    from fastrec.search import Budget, autotune

__all__ = [
    "QAT",
    "AttentionPattern",
    "BlockPruning",
    "Budget",
    "Grouped",
    "HiddenStates",
    "Int8",
    "LowRank",
    "NMPruning",
    "Recipe",
    "WindowSparse",
    "__version__",
    "autotune",
    "compile",
    "compress",
    "data",
    "distill",
    "errors",
    "export",
    "exporters",
    "kernels",
    "load",
    "measure",
    "models",
    "nn",
    "prune_",
    "quantize_",
    "replace_",
    "report",
    "runtime",
    "save",
    "search",
    "sensitivity",
    "serving",
    "student",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastrec.{name}")
    raise AttributeError(f"module 'fastrec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

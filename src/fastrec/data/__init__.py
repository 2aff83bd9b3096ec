"""Interaction logs in, memory-mapped per-user sequences and training batches out.

Names are resolved on first use, so that ``import fastrec.data`` loads neither polars nor rich.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "BEHAVIOURS": "fastrec.data.parse",
    "GenerateReport": "fastrec.data.generation",
    "PrepareReport": "fastrec.data.preparation",
    "SequenceBatch": "fastrec.data.batch",
    "SequenceDataset": "fastrec.data.dataset",
    "TAOBAO_WINDOW": "fastrec.data.parse",
    "generate": "fastrec.data.generation",
    "prepare": "fastrec.data.preparation",
}

if TYPE_CHECKING:
    from fastrec.data.batch import SequenceBatch
    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.generation import GenerateReport, generate
    from fastrec.data.parse import BEHAVIOURS, TAOBAO_WINDOW
    from fastrec.data.preparation import PrepareReport, prepare

__all__ = [
    "BEHAVIOURS",
    "TAOBAO_WINDOW",
    "GenerateReport",
    "PrepareReport",
    "SequenceBatch",
    "SequenceDataset",
    "generate",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastrec.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Interaction logs in, memory-mapped per-user sequences and training batches out.

Names are resolved on first use, so that ``import fastrec.data`` loads neither polars nor rich.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".batch": ("SequenceBatch",),
        ".behaviours": ("BEHAVIOURS",),
        ".dataset": ("SequenceDataset",),
        ".generation": ("GenerateReport", "generate"),
        ".layout": ("ReadOptions",),
        ".opening": ("open_or_prepare",),
        ".original_ids": ("OriginalIds",),
        ".preparation": ("PrepareReport", "prepare"),
        ".sessions": ("TAOBAO_WINDOW",),
    },
)

if TYPE_CHECKING:
    from fastrec.data.batch import SequenceBatch
    from fastrec.data.behaviours import BEHAVIOURS
    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.generation import GenerateReport, generate
    from fastrec.data.layout import ReadOptions
    from fastrec.data.opening import open_or_prepare
    from fastrec.data.original_ids import OriginalIds
    from fastrec.data.preparation import PrepareReport, prepare
    from fastrec.data.sessions import TAOBAO_WINDOW

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
        ".dataset": ("SequenceDataset",),
        ".generation": ("GenerateReport", "generate"),
        ".parse": ("BEHAVIOURS", "TAOBAO_WINDOW"),
        ".preparation": ("PrepareReport", "prepare"),
    },
)

if TYPE_CHECKING:
    from fastrec.data.batch import SequenceBatch
    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.generation import GenerateReport, generate
    from fastrec.data.parse import BEHAVIOURS, TAOBAO_WINDOW
    from fastrec.data.preparation import PrepareReport, prepare

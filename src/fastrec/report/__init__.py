"""Table I, measured: every variant on every engine, with plots. Light to import (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".schema": ("Row", "validate"),
        ".settings": ("Table1Settings",),
        ".table": ("table1",),
    },
)

if TYPE_CHECKING:
    from fastrec.report.schema import Row, validate
    from fastrec.report.settings import Table1Settings
    from fastrec.report.table import table1

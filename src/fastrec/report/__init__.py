"""Table I, measured: every variant on every engine, with plots. Light to import (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Row": "schema",
    "Table1Settings": "settings",
    "table1": "table",
    "validate": "schema",
}

if TYPE_CHECKING:
    from fastrec.report.schema import Row, validate
    from fastrec.report.settings import Table1Settings
    from fastrec.report.table import table1

__all__ = ["Row", "Table1Settings", "table1", "validate"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"fastrec.report.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'fastrec.report' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

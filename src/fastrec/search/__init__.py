"""Search what compression makes of each layer, under a budget. Light to import (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AutotuneResult": "result",
    "Budget": "budget",
    "Choice": "space",
    "CostModel": "fit",
    "Point": "result",
    "Space": "space",
    "autotune": "search",
    "fit_costs": "fit",
}

if TYPE_CHECKING:
    from fastrec.search.budget import Budget
    from fastrec.search.fit import CostModel, fit_costs
    from fastrec.search.result import AutotuneResult, Point
    from fastrec.search.search import autotune
    from fastrec.search.space import Choice, Space

__all__ = [
    "AutotuneResult",
    "Budget",
    "Choice",
    "CostModel",
    "Point",
    "Space",
    "autotune",
    "fit_costs",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"fastrec.search.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'fastrec.search' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

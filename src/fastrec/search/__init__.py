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
    from fastrec.tune.budget import Budget
    from fastrec.tune.fit import CostModel, fit_costs
    from fastrec.tune.result import AutotuneResult, Point
    from fastrec.tune.search import autotune
    from fastrec.tune.space import Choice, Space

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
        return getattr(importlib.import_module(f"fastrec.tune.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'fastrec.tune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Search what compression makes of each layer, under a budget. Light to import (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".acceleration": ("Accelerated", "Way", "accelerate"),
        ".budget": ("Budget",),
        ".fit": ("CostModel", "fit_costs"),
        ".result": ("AutotuneResult", "Point"),
        ".search": ("autotune",),
        ".space": ("Choice", "Space"),
    },
)

if TYPE_CHECKING:
    from fastrec.search.acceleration import Accelerated, Way, accelerate
    from fastrec.search.budget import Budget
    from fastrec.search.fit import CostModel, fit_costs
    from fastrec.search.result import AutotuneResult, Point
    from fastrec.search.search import autotune
    from fastrec.search.space import Choice, Space

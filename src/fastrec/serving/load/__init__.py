"""Load tests: an open-loop generator, its requests and results (``fastrec loadtest``)."""

from __future__ import annotations

from fastrec.serving.load.capacity import find_capacity
from fastrec.serving.load.generator import (
    Generator,
    PlannedRequest,
    RequestLog,
    Target,
    TryResult,
    run,
)
from fastrec.serving.load.plan import (
    Bursts,
    LoadPlan,
    Mix,
    RequestSizes,
    Retry,
    Schedule,
    Stage,
    draw,
)
from fastrec.serving.load.results import summary
from fastrec.serving.load.runner import run_precisely

__all__ = [
    "Bursts",
    "Generator",
    "LoadPlan",
    "Mix",
    "PlannedRequest",
    "RequestLog",
    "RequestSizes",
    "Retry",
    "Schedule",
    "Stage",
    "Target",
    "TryResult",
    "draw",
    "find_capacity",
    "run",
    "run_precisely",
    "summary",
]

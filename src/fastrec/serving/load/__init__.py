"""Load: an open-loop generator, what it sends and what came of it (``fastrec loadtest``)."""

from __future__ import annotations

from fastrec.serving.load.capacity import find_capacity
from fastrec.serving.load.generator import Answer, Generator, Log, Shot, Target, run
from fastrec.serving.load.plan import Bursts, Mix, Plan, Retry, Schedule, Sizes, Stage, draw
from fastrec.serving.load.results import summary
from fastrec.serving.load.runner import run_precisely

__all__ = [
    "Answer",
    "Bursts",
    "Generator",
    "Log",
    "Mix",
    "Plan",
    "Retry",
    "Schedule",
    "Shot",
    "Sizes",
    "Stage",
    "Target",
    "draw",
    "find_capacity",
    "run",
    "run_precisely",
    "summary",
]

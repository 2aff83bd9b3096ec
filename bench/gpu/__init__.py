"""The parts of ``make gpu-report``: a section is a process of its own with a share of the time.

timing      device time by replayed graphs, host latency
sheet       rows, comparisons: a gate before any timing
ceilings attention products ranker requests ops
            sections that measure
commands    sections that run something: build, tests, compute-sanitizer, tuning
goals page pictures
            what became of it
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """``module:function`` takes a :class:`gpu.sheet.Sheet`; it is ended after ``seconds``.

    ``dry``: whether it also runs without a GPU, on small inputs and untimed. ``asked``: it runs
    only where it is named, because it would take most of the time.
    """

    name: str
    where: str
    seconds: float
    dry: bool = True
    asked: bool = False

    def run(self, sheet: object) -> None:
        module, function = self.where.split(":")
        getattr(importlib.import_module(f"gpu.{module}"), function)(sheet)


# In order of importance: what the time does not reach is what matters least.
SECTIONS = (
    Section("build", "commands:build", 100, dry=False),
    Section("ceilings", "ceilings:measure", 20, dry=False),
    Section("tuning", "commands:tune", 40, dry=False),
    Section("tuning-ranker", "ranker:tune", 300, dry=False, asked=True),
    Section("products", "products:measure", 50),
    Section("attention-long", "attention:long", 60),
    Section("attention-short", "attention:short", 40),
    Section("ranker-1", "ranker:batch_1", 90),
    Section("ranker-64", "ranker:batch_64", 90),
    Section("requests", "requests:count", 45),
    Section("tests", "commands:tests", 120),
    Section("sanitizer", "commands:sanitize", 60, dry=False),
    Section("attention-autotuned", "attention:autotuned", 60, dry=False),
    Section("ranker-8", "ranker:batch_8", 60),
    Section("ops", "ops:measure", 120, dry=False),
)

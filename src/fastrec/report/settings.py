"""Settings of ``fastrec table1``, and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrec.data.storage import is_prepared
from fastrec.errors import ArgumentError
from fastrec.measure.machine import usable_cpus
from fastrec.report.schema import ENGINES, KNOWN_ENGINES

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""

CANDIDATES = 50
"""Candidates of a request, here and in the paper's metric: one positive and 49 others."""


@dataclass(frozen=True)
class Table1Settings:
    """How a Table I is made.

    Args:
        preset: size of the generated log (see :func:`fastrec.data.generate`) where ``data`` is
            None; "demo" also means short budgets everywhere, unless ``full``.
        full: the demo's log with the budgets of any other run.
        data: a log of any layout, or a folder of ``fastrec data prepare``.
        columns: the log's columns, where looking does not find them: ``user=..,item=..``.
        model: trained weights instead of training: what ``fastrec.save`` or ``fastrec train``
            wrote, or a folder of variants from ``fastrec compress``.
        config: "demo" = the canonical ranker's compute with tables as large as the data needs;
            "canonical" = :meth:`RankerConfig.taobao`, all 32.0 M parameters of it.
        epochs, steps: of the baseline's training; None = the preset's.
        recipe_steps: one number for every stage of compression (fine-tuning a round, QAT,
            distillation); None = the preset's recipe.
        seconds_per_engine: timing budget of an engine at one batch size.
        engines: which of :data:`fastrec.report.schema.KNOWN_ENGINES`; LiteRT and those of a GPU
            only by name.
        batches: batch sizes timed.
        throughput_batches: batch sizes of which the best throughput is kept.
        threads: threads of every engine.
        users: users evaluated on candidates, native engine; None = all with a test item.
        rival_users: users evaluated on candidates, each rival.
        catalogue_seconds: time for HR@50 and NDCG@50 on each variant; sets how many users.
        rss_requests: requests that a child process answers for its peak memory.
        seed: of data, training, compression and evaluation.
    """

    preset: str = "demo"
    full: bool = False
    data: Path | None = None
    columns: str | None = None
    model: Path | None = None
    config: str = "demo"
    epochs: int | None = None
    steps: int | None = None
    recipe_steps: int | None = None
    seconds_per_engine: float = 2.0
    engines: tuple[str, ...] = ENGINES
    batches: tuple[int, ...] = (1, 8, 64)
    throughput_batches: tuple[int, ...] = (1, 8, 64)
    throughput_seconds: float = 1.0
    threads: int = dataclasses.field(default_factory=usable_cpus)
    users: int | None = None
    rival_users: int = 512
    catalogue_seconds: float = 60.0
    rss_requests: int = 20
    seed: int = 0

    @classmethod
    def make(cls, preset: str = "demo", **changes: Any) -> Table1Settings:
        """The preset's settings with those of ``changes`` that are not None.

        Raises:
            ArgumentError: an unknown preset or a value out of range.
        """
        base: dict[str, Any] = {"preset": preset}
        if preset == "demo" and not changes.get("full") and changes.get("data") is None:
            # Everything within four minutes on two cores.
            base |= {
                "seconds_per_engine": 0.7,
                "batches": (1, 8),
                "throughput_seconds": 0.25,
                "throughput_batches": (1, 8),
                "users": 800,
                "catalogue_seconds": 3.0,
            }
        base |= {name: value for name, value in changes.items() if value is not None}
        return cls(**base)

    def __post_init__(self) -> None:
        presets = ("demo", "small", "medium", "taobao")
        if self.preset not in presets:
            raise ArgumentError("preset", f"one of {presets}", repr(self.preset))
        if self.config not in ("demo", "canonical"):
            raise ArgumentError("config", "'demo' or 'canonical'", repr(self.config))
        for name in ("data", "model"):
            value = getattr(self, name)
            if value is not None and not Path(value).exists():
                raise ArgumentError(name, "an existing file or folder", str(value))
        if not self.engines or set(self.engines) - set(KNOWN_ENGINES):
            raise ArgumentError("engines", f"names among {', '.join(KNOWN_ENGINES)}", self.engines)
        for name in ("batches", "throughput_batches"):
            sizes = getattr(self, name)
            if not sizes or any(not isinstance(b, int) or b < 1 for b in sizes):
                raise ArgumentError(name, "positive integers", sizes)
        for name in ("seconds_per_engine", "throughput_seconds", "catalogue_seconds"):
            if not getattr(self, name) > 0:
                raise ArgumentError(name, "a positive number of seconds", getattr(self, name))
        for name in ("threads", "rival_users", "rss_requests"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "a positive integer", getattr(self, name))
        for name in ("epochs", "steps", "recipe_steps", "users"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(name, "a positive integer or None", value)
        if self.seed < 0:
            raise ArgumentError("seed", ">= 0", self.seed)
        if self.columns is not None and (self.data is None or is_prepared(self.data)):
            raise ArgumentError("columns", "none without a log (data)", self.columns)

    @property
    def quick(self) -> bool:
        """Whether this is the demo, which is made to be short."""
        return self.preset == "demo" and not self.full and self.data is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; of paths only the last part: a report names no user's folders."""
        values = dataclasses.asdict(self)
        for name in ("data", "model"):
            values[name] = None if values[name] is None else Path(values[name]).name
        return values

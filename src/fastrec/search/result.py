"""Result of ``autotune``: the best model, the points around it, a table and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastrec.compress.artifact import save
from fastrec.plotting import BLUE, GREY, ORANGE, figure, png
from fastrec.search.budget import Budget
from fastrec.search.fit import CostModel

_AXES = {"latency_ms": "latency of one call [ms]", "size_mb": "artifact [MB]"}


@dataclass(frozen=True)
class Point:
    """One model with a choice for every layer, made and measured.

    Attributes:
        key: names it in the journal.
        chosen: layer -> name of its choice.
        quality: as ``evaluate`` gave it, the best of its rounds.
        latency_ms, predicted_ms: measured on the compiled engine, and the sum of the layers' costs.
        size_mb, predicted_mb: likewise of the artifact, in 10^6 bytes.
        round: of fine-tuning, after which it had that quality; 0 is the model as it came.
        within: whether the measured costs keep within the budget.
        latency_again_ms: of the best point: measured anew at the end, as it is returned.
    """

    key: str
    chosen: dict[str, str]
    quality: float
    latency_ms: float
    predicted_ms: float
    size_mb: float
    predicted_mb: float
    round: int
    within: bool
    latency_again_ms: float | None = None


@dataclass(frozen=True)
class AutotuneResult:
    """Result of :func:`fastrec.autotune`.

    Attributes:
        best: the model with the best quality within the budget, in eval mode, ready for
            ``fastrec.compile`` and ``fastrec.save``.
        chosen: its point.
        points: all points that were measured; the first is the model as it came.
        budget: what was asked for.
        losses: layer -> choice -> quality lost where it alone has that choice, without
            fine-tuning; infinite where the choice cannot be made.
        costs: layer -> choice -> ``us`` and ``bytes``, measured.
        cost_model: the paper's cost model and a better one, fitted to the measurements; None where
            there are too few layers.
        left: layer -> why it has no choice.
        reused: journal entries that an earlier call had left.
    """

    best: nn.Module
    chosen: Point
    points: Sequence[Point]
    budget: Budget
    losses: Mapping[str, Mapping[str, float]] = field(repr=False)
    costs: Mapping[str, Mapping[str, Mapping[str, float]]] = field(repr=False)
    cost_model: CostModel | None = field(repr=False)
    left: Mapping[str, str]
    reused: int = 0

    @property
    def front(self) -> list[Point]:
        """The measured points that no other one beats in quality and in every limited cost,
        cheapest first."""
        names = list(self.budget.limits)

        def beats(a: Point, b: Point) -> bool:
            pairs = [(getattr(b, n), getattr(a, n)) for n in names] + [(a.quality, b.quality)]
            return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

        left = [p for p in self.points if not any(beats(q, p) for q in self.points)]
        return sorted(left, key=lambda p: getattr(p, names[0]))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON; an infinite loss is None."""
        return {
            "budget": self.budget.to_dict(),
            "chosen": asdict(self.chosen),
            "points": [asdict(p) for p in self.points],
            "front": [p.key for p in self.front],
            "losses": {
                unit: {name: loss if loss < float("inf") else None for name, loss in row.items()}
                for unit, row in self.losses.items()
            },
            "costs": {unit: {n: dict(c) for n, c in row.items()}
                      for unit, row in self.costs.items()},
            "cost_model": None if self.cost_model is None else self.cost_model.to_dict(),
            "left": dict(self.left),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The best model as ``fastrec.save`` writes it, with its point in the manifest's info."""
        info = {"autotune": {"chosen": asdict(self.chosen), "budget": self.budget.to_dict()}}
        return save(self.best, path, info=info)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self) -> Any:
        """The points as a ``rich`` table, cheapest first; the chosen one is marked."""
        from rich.table import Table

        limits = ", ".join(f"{n} <= {v:g}" for n, v in self.budget.limits.items())
        table = Table(title=f"autotune, {limits}, batch {self.budget.batch}")
        for title in ("", "quality", "ms", "predicted", "MB", "predicted", "round", "choices"):
            text = title in ("", "choices")
            table.add_column(title, justify="left" if text else "right", overflow="fold")
        front = {p.key for p in self.front}
        for p in sorted(self.points, key=lambda p: (self.budget.use(p), -p.quality)):
            marks = [("best", p.key == self.chosen.key and p.round == self.chosen.round),
                     ("over", not p.within), ("front", p.key in front)]  # fmt: skip
            mark = next((name for name, holds in marks if holds), "")
            numbers = (f"{p.quality:.4f}", f"{p.latency_ms:.3f}", f"{p.predicted_ms:.3f}")
            sizes = (f"{p.size_mb:.2f}", f"{p.predicted_mb:.2f}", str(p.round))
            style = "bold" if mark == "best" else "dim" if mark == "over" else None
            table.add_row(mark, *numbers, *sizes, summary(p.chosen), style=style)
        return table

    def plot(self, path: str | os.PathLike[str] | None = None) -> bytes:
        """Quality against each limited cost, with the front, and what the cost models say of each
        layer, as PNG; also written to ``path``.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        names = list(self.budget.limits)
        panels = len(names) + (self.cost_model is not None)
        made, axes = figure(5.2 * panels, 4.2, panels)
        for axis, name in zip(axes, names, strict=False):
            self._plot_front(axis, name)
        if self.cost_model is not None:
            _plot_fits(axes[-1], self.cost_model)
        return png(made, path)

    def _plot_front(self, axis: Any, name: str) -> None:
        groups = (
            ("within the budget", BLUE, [p for p in self.points[1:] if p.within]),
            ("above it", GREY, [p for p in self.points[1:] if not p.within]),
            ("the model as it came", ORANGE, self.points[:1]),
        )
        for label, colour, points in groups:
            x, y = [getattr(p, name) for p in points], [p.quality for p in points]
            axis.scatter(x, y, s=28, color=colour, label=label, zorder=3)
        # Of this cost alone: a point may be on the front by its other cost.
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (getattr(p, name), -p.quality)):
            if not front or point.quality > front[-1].quality:
                front.append(point)
        axis.plot([getattr(p, name) for p in front], [p.quality for p in front], color=BLUE,
                  linewidth=1, drawstyle="steps-post", label="front")  # fmt: skip
        best = self.chosen
        axis.scatter([getattr(best, name)], [best.quality], s=110, facecolors="none",
                     edgecolors="black", label="chosen", zorder=4)  # fmt: skip
        axis.axvline(self.budget.limits[name], color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(_AXES[name])
        axis.set_ylabel("quality")
        axis.legend(fontsize=7.5)
        axis.grid(linewidth=0.4, alpha=0.4)


def summary(chosen: Mapping[str, str]) -> str:
    """Choices with the number of layers that have each, the commonest first."""
    counts: dict[str, int] = {}
    for name in chosen.values():
        counts[name] = counts.get(name, 0) + 1
    return "; ".join(f"{n} x {name}" for name, n in sorted(counts.items(), key=lambda i: -i[1]))


def _plot_fits(axis: Any, model: CostModel) -> None:
    """Predicted over measured, layer by layer."""
    for name, colour in (("paper", ORANGE), ("precise", BLUE)):
        fit = model.layers[name]
        ratios = [p / m for p, m in zip(fit.predicted_us, fit.measured_us, strict=True)]
        axis.scatter(fit.measured_us, ratios, s=9, color=colour, alpha=0.6,
                     label=f"{fit.form}: typical error {fit.relative_error:.0%}")  # fmt: skip
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("a layer's step, measured [us]")
    axis.set_ylabel("predicted / measured")
    axis.legend(fontsize=7)
    axis.grid(linewidth=0.4, alpha=0.4)

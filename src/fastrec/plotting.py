"""Plots as PNG: matplotlib without a display, never the caller's backend or figures."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from fastrec.errors import ArgumentError, MissingDependencyError

# Okabe-Ito: told apart by readers with any colour vision, and in print.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, YELLOW, GREY = "#E69F00", "#56B4E9", "#F0E442", "#999999"


def figure(
    width: float, height: float, columns: int = 1, *, share_y: bool = False
) -> tuple[Any, list[Any]]:
    """A figure of ``width`` x ``height`` inches and its axes, side by side.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "plots") from error
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, columns, squeeze=False, sharey=share_y)[0])


def plain(axis: Any, grid: str = "both") -> None:
    """Thin grid lines behind the data, no frame above and to the right."""
    axis.grid(axis=grid, which="major", linewidth=0.5, alpha=0.4)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def png(made: Any, path: str | os.PathLike[str] | None = None) -> bytes:
    """A figure as PNG bytes, also written to ``path``."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png")
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def check_png(argument: str, path: Path | None) -> None:
    """Refuse, before any work, a plot that could not be drawn or is no PNG file.

    Raises:
        ArgumentError: the name does not end in .png.
        MissingDependencyError: matplotlib is not installed.
    """
    if path is not None:
        if path.suffix != ".png":
            raise ArgumentError(argument, "a file that ends in .png", path)
        figure(1, 1)

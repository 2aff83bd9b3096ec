"""Known figures of the paper's own Table I, each with its source.

The paper: J. Shao, J. Dong, D. Wang, K. Shih, D. Li, C. Zhou, "Deep Learning Model Acceleration and
Optimization Strategies for Real-Time Recommendation Systems", MLISE 2025, arXiv:2506.11421. Its
table was not at hand when this was written: a cell without a source here is printed as not known,
never filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastrec.report.schema import VARIANTS

TITLE = (
    "Deep Learning Model Acceleration and Optimization Strategies for Real-Time Recommendation "
    "Systems (arXiv:2506.11421)"
)
ABSTRACT = "the paper's abstract"
SPECIFICATION = "fastrec's specification, which quotes the paper"
NOT_KNOWN = "not known"

COLUMNS = ("parameters", "latency", "throughput", "hit rate")


@dataclass(frozen=True)
class PaperFigure:
    """One figure of the paper: which variant, which column of Table I, and who says so."""

    variant: str
    column: str
    text: str
    source: str


FIGURES = (
    PaperFigure("distilled", "parameters", "<= 6.4 M", SPECIFICATION),
    PaperFigure("pruned_quantized", "hit rate", "-2.7 % (97.3 % kept)", SPECIFICATION),
    PaperFigure("distilled", "hit rate", "99.2 to 99.4 % kept", SPECIFICATION),
)
GENERAL = (
    PaperFigure("all methods together", "latency", "< 30 % of the baseline", ABSTRACT),
    PaperFigure("all methods together", "throughput", "> 2x the baseline", ABSTRACT),
    PaperFigure("pruned", "method", "p = 40 % of the weights in K = 3 rounds", SPECIFICATION),
)


def paper_cell(variant: str, column: str) -> str:
    """The paper's figure for a cell of its Table I, or ``"not known"``."""
    for figure in FIGURES:
        if (figure.variant, figure.column) == (variant, column):
            return figure.text
    return NOT_KNOWN


def paper_table() -> dict[str, Any]:
    """The paper's part of table1.json: cells (null where not known) and sources."""
    known = {(f.variant, f.column): f for f in FIGURES}
    cells: dict[str, dict[str, str | None]] = {}
    for variant in VARIANTS:
        row = {column: known.get((variant, column)) for column in COLUMNS}
        cells[variant] = {column: figure.text if figure else None for column, figure in row.items()}
    return {
        "title": TITLE,
        "rows": cells,
        "figures": [vars(figure) for figure in (*FIGURES, *GENERAL)],
        "why": "null: the paper's full table was not at hand, so the cell is not known here",
    }

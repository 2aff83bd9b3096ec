"""The profile of a native plan as a table and as a plot; the rows are ``PlanEngine.profile``'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fastrec.plotting import BLUE, GREEN, GREY, ORANGE, figure, plain

if TYPE_CHECKING:
    from fastrec.measure.ceilings import Ceilings

# What bounds a step -> its colour.
COLOURS = {"int8 peak": ORANGE, "fp32 peak": BLUE, "bandwidth": GREEN, None: GREY}
_BAR = 0.8


def table(rows: Sequence[Mapping[str, Any]], ceilings: Ceilings) -> Table:
    """A row a step, and what they come to together."""
    known = [row for row in rows if row["limit_us"] is not None]
    total, bounded = sum(row["us"] for row in rows), sum(row["us"] for row in known)
    peaks = ", ".join(f"{n} {g:.0f} GOPS" for n, g in ceilings.peaks.items() if g)
    reads = ", ".join(f"{n} {g:.0f} GB/s" for n, g in ceilings.levels.items())
    shown = Table(
        caption=f"us: best, median. % of what {ceilings.threads} thread(s) were measured to do at "
        f"most: {peaks}; reading {reads}",
        show_footer=True,
    )
    footers = {
        "module": f"{len(rows)} steps",
        "MACs": f"{sum(row['macs'] or 0 for row in rows):,}",
        "us": f"{total:.1f}",
        "% of limit": _percent(
            sum(row["limit_us"] for row in known) / bounded if bounded else None
        ),
    }
    left = ("module", "op", "kernel", "limit")
    for title in ("module", "op", "kernel", "kept", "MACs", "read kB", "written kB", "us", "median",
                  "% of limit", "limit"):  # fmt: skip
        justify: Any = "left" if title in left else "right"
        shown.add_column(title, footers.get(title, ""), justify=justify, overflow="fold")
    for row in rows:
        shown.add_row(
            row["module"],
            row["op"],
            row["kernel"],
            "" if row["density"] is None else f"{row['density']:.2f}",
            "" if row["macs"] is None else f"{row['macs']:,}",
            f"{row['read_bytes'] / 1e3:.1f}",
            f"{row['written_bytes'] / 1e3:.1f}",
            f"{row['us']:.1f}",
            f"{row['us_median']:.1f}",
            _percent(row["of_limit"]),
            row["limit"] or "not known",
        )
    return shown


def plot_profile(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Time of each step in order, and the part of it that the machine's limit accounts for."""
    made, (axis,) = figure(9, 1.4 + 0.24 * max(len(rows), 1))
    for y, row in enumerate(rows):
        colour = COLOURS[row["limit"]]
        axis.barh(y, row["us"], _BAR, color=colour, alpha=0.35)
        if row["limit_us"] is not None:
            axis.barh(y, min(row["limit_us"], row["us"]), _BAR, color=colour)
        axis.plot([row["us"], row["us_median"]], [y, y], color="#222222", linewidth=1)
        axis.annotate(
            f"{row['us']:.1f}" + (f" ({_percent(row['of_limit'])})" if row["limit"] else ""),
            (max(row["us"], row["us_median"]), y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    titles = [" ".join(filter(None, (row["module"], f"[{row['op']}]"))) for row in rows]
    axis.set_yticks(range(len(rows)), titles, fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, 1.15 * max([1.0, *(row["us_median"] for row in rows)]))
    axis.set_xlabel("microseconds in one call: best (bar) to median (line)", fontsize=9)
    plain(axis, "x")
    for limit in dict.fromkeys(row["limit"] for row in rows):
        axis.barh([0], [0], color=COLOURS[limit], label=limit or "limit not known")
    axis.legend(title="bound by", fontsize=8, loc="upper right")
    total = sum(row["us"] for row in rows)
    made.suptitle(f"Steps of the plan, {total:.0f} us; dark: what the limit accounts for")
    return made


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"

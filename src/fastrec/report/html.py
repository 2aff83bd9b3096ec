"""``report.html``: one file with everything in it, no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastrec.report.layout import (
    METRIC_TITLES,
    VARIANT_TITLES,
    comparison_with_paper,
    group_rows,
    reasons,
)
from fastrec.report.markdown import (
    SPEED_HEADER,
    accuracy_rows,
    difference_rows,
    facts,
    protocol_notes,
    ratio_lines,
    speed_rows,
)
from fastrec.report.paper import GENERAL, TITLE
from fastrec.report.schema import ACCURACY

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1180px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { border-bottom: 2px solid #888; text-align: right; }
th.left, td.left { text-align: left; } td.wrap { white-space: normal; max-width: 60rem; }
tr.native td { background: #fff3ea; font-weight: 600; } tr.first td { border-top: 2px solid #bbb; }
img { max-width: 100%; } .scroll { overflow-x: auto; } .note { color: #555; font-size: 13px; }
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    """A table; the first ``left`` columns are text."""
    head = "".join(
        f'<th class="left">{escape(c)}</th>' if i < left else f"<th>{escape(c)}</th>"
        for i, c in enumerate(header)
    )
    body, previous = [], None
    for row in rows:
        marks = []
        if row[0] != previous:
            marks.append("first")
            previous = row[0]
        if len(row) > 1 and row[1].startswith("fastrec native") and len(row) > 4:
            marks.append("native")
        cells = "".join(
            f'<td class="left{" wrap" if len(str(c)) > 60 else ""}">{escape(str(c))}</td>'
            if i < left
            else f"<td>{escape(str(c))}</td>"
            for i, c in enumerate(row)
        )
        body.append(f'<tr class="{" ".join(marks)}">{cells}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def image(name: str, images: Mapping[str, bytes]) -> str:
    """A PNG inside the page; nothing where it is not among ``images``."""
    if name not in images:
        return ""
    data = base64.b64encode(images[name]).decode("ascii")
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{data}"></p>'


def page(title: str, heading: str, summary: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole document; ``sections``: a heading and HTML each."""
    body = "".join(f"<h2>{escape(name)}</h2>{content}" for name, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(heading)}</h1><p>{escape(summary)}</p>{body}</body></html>\n"
    )


def render_html(report: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The report as one HTML page; ``images``: plot name -> PNG bytes."""
    rows = report["rows"]
    metrics = [METRIC_TITLES[name] for name in ACCURACY]
    general = [f"{f.variant}: {f.column} {f.text} ({f.source})" for f in GENERAL]
    settings = {
        (VARIANT_TITLES[g.variant], g.title): g.any_row["settings"] for g in group_rows(rows)
    }
    nulls = [f"{why}: {'; '.join(cells)}" for why, cells in reasons(rows).items()]
    sections = [
        ("Latency", image("latency", images)),
        (
            "INT8: native against the best rival",
            '<p class="note">Ratio of median latencies with its 95 % interval.</p>'
            + _list(ratio_lines(report["ratios"])),
        ),
        ("Throughput", image("throughput", images)),
        (
            "Recommendation quality",
            image("accuracy", images)
            + table(["variant", "engine", *metrics], accuracy_rows(rows))
            + _list(protocol_notes(rows))
            + "<h3>Paired difference to the baseline</h3>"
            + table(["variant", "", *metrics], difference_rows(rows)),
        ),
        ("Resources", image("resources", images)),
        ("All rows", table(SPEED_HEADER, speed_rows(rows))),
        (
            "Beside the paper's Table I",
            table(
                ["variant", "column", "the paper", "this run"],
                [(VARIANT_TITLES[v], c, p, o) for v, c, p, o in comparison_with_paper(rows)],
                left=4,
            )
            + f'<p class="note">The paper: {escape(TITLE)}. {escape(report["paper"]["why"])}.</p>'
            + _list(general),
        ),
        (
            "What each engine ran",
            table(
                ["variant", "engine", "settings"], [(v, t, s) for (v, t), s in settings.items()], 3
            ),
        ),
        ("Not measured, and why", _list(nulls) if nulls else "<p>Every cell was measured.</p>"),
        ("Machine", table(["", ""], facts(report["machine"]))),
        (
            "Data and models",
            table(["", ""], [*facts(report["dataset"], "data."), *facts(report["run"], "run.")]),
        ),
    ]
    return page("fastrec: Table I, measured", "Table I, measured", report["summary"], sections)

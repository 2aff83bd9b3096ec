"""Every rendering shows every row, every reason, and what is not known of the paper."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from report_samples import made_up_report
from rich.console import Console

from fastrec.report.html import render_html
from fastrec.report.layout import (
    VARIANT_TITLES,
    comparison_with_paper,
    group_rows,
    number,
    share,
    signed,
)
from fastrec.report.markdown import render_markdown
from fastrec.report.paper import FIGURES, NOT_KNOWN, paper_cell, paper_table
from fastrec.report.plots import PLOTS, write_plots
from fastrec.report.schema import VARIANTS
from fastrec.report.terminal import render_terminal


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return made_up_report()


def _cells(text: str) -> list[str]:
    return [cell.strip() for line in text.splitlines() for cell in line.split("|")]


def test_markdown_has_every_row_and_reason(report: dict[str, Any]) -> None:
    text = render_markdown(report)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    for group in group_rows(report["rows"]):
        for batch in group.by_batch:
            head = f"| {VARIANT_TITLES[group.variant]} | {group.title} | {batch} |"
            assert sum(line.startswith(head) for line in lines) == 1
    assert "it crashed: <boom>" in text
    assert "0.50 [0.48, 0.52]" in text
    assert "no ratio: no rival was timed" in text


def test_html_has_every_row_escaped_and_needs_no_network(report: dict[str, Any]) -> None:
    text = render_html(report, {"latency": b"png"})
    body = text.split("<h2>All rows</h2>")[1].split("<h2>")[0]
    assert body.count("<tr") == len(report["rows"]) + 1
    assert "it crashed: &lt;boom&gt;" in text
    assert "<boom>" not in text
    assert "data:image/png;base64,cG5n" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text


def test_terminal_shows_engines_ratios_and_reasons(report: dict[str, Any]) -> None:
    stream = io.StringIO()
    render_terminal(report, Console(file=stream, width=200))
    text = stream.getvalue()
    for group in group_rows(report["rows"]):
        assert group.title in text
    assert "0.50 [0.48, 0.52]" in text
    assert "it crashed: <boom>" in text


def test_every_cell_of_the_paper_is_a_sourced_figure_or_not_known(report: dict[str, Any]) -> None:
    sourced = {(f.variant, f.column): f.text for f in FIGURES}
    lines = comparison_with_paper(report["rows"])
    assert {variant for variant, *_ in lines} == set(VARIANTS)
    for variant, column, theirs, _ in lines:
        assert theirs == sourced.get((variant, column), NOT_KNOWN)
    assert all(figure["source"] for figure in paper_table()["figures"])
    assert paper_cell("baseline", "latency") == NOT_KNOWN


def test_plots_are_written_for_whatever_was_measured(
    report: dict[str, Any], tmp_path: Path
) -> None:
    images = write_plots(report["rows"], tmp_path)
    assert set(images) == set(PLOTS)
    for name, data in images.items():
        assert data.startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.png").read_bytes() == data


def test_plots_of_rows_without_any_figure(report: dict[str, Any], tmp_path: Path) -> None:
    failed = [row for row in report["rows"] if row["why"]]
    assert set(write_plots(failed, tmp_path)) == set(PLOTS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.1234, "0.123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.4, "1,234"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_and_differences() -> None:
    assert share(0.5, [0.4, 0.6]) == "0.500 [0.400, 0.600]"
    assert share(None, None) == "-"
    assert signed([-0.01, -0.02, 0.0]) == "-0.010 [-0.020, +0.000]"

"""Rows of Table I: a figure of this run, or null with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from report_samples import made_up_report, made_up_row

from fastrec.errors import ArgumentError, ArtifactError
from fastrec.report.schema import NULLABLE, Row, validate
from fastrec.report.settings import Table1Settings


def test_a_made_up_report_is_valid() -> None:
    validate(made_up_report())


def test_reasons_are_kept_only_for_what_is_null() -> None:
    row = made_up_row("baseline", "torch", "fp32", 1, 2.0)
    row.rss_mb = None
    row.explain(NULLABLE, "the process failed")
    row.why["latency_ms"] = "left over"
    assert row.to_dict()["why"] == {"rss_mb": "the process failed"}


def test_an_empty_row_is_null_everywhere() -> None:
    row = Row("baseline", "torch", "fp32", 1, 2)
    assert all(row.is_null(name) for name in NULLABLE)


def _broken(change: str) -> dict[str, Any]:
    report = copy.deepcopy(made_up_report())
    row = report["rows"][0]
    if change == "null without a reason":
        row["latency_ms"]["p99"] = None
    elif change == "not finite":
        row["throughput_rps"] = float("inf")
    elif change == "negative":
        row["size_mb"] = -1.0
    elif change == "a text":
        row["mrr"] = "0.5"
    elif change == "no field":
        del row["batch"]
    elif change == "unknown engine":
        row["engine"] = "abacus"
    elif change == "no machine":
        report["machine"] = None
    else:
        report["format"] = "other"
    return report


@pytest.mark.parametrize(
    "change",
    [
        "null without a reason",
        "not finite",
        "negative",
        "a text",
        "no field",
        "unknown engine",
        "no machine",
        "other format",
    ],
)
def test_validate_refuses(change: str) -> None:
    with pytest.raises(ArtifactError, match="table1"):
        validate(_broken(change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "huge"),
        ("config", "tiny"),
        ("engines", ("native", "abacus")),
        ("engines", ()),
        ("batches", (0,)),
        ("seconds_per_engine", 0.0),
        ("threads", 0),
        ("users", 0),
        ("seed", -1),
    ],
)
def test_bad_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        Table1Settings(**{name: value})


def test_a_missing_log_is_named(tmp_path: Any) -> None:
    with pytest.raises(ArgumentError, match="data"):
        Table1Settings.make(data=tmp_path / "none.csv")


def test_settings_name_no_folders(tmp_path: Any) -> None:
    log = tmp_path / "log.csv"
    log.write_text("")
    assert Table1Settings.make(data=log).to_dict()["data"] == "log.csv"

"""Every engine on the five variants of a small ranker."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fastrec.errors import ArgumentError
from fastrec.measure.machine import machine_card
from fastrec.models import RankerConfig
from fastrec.report.layout import ENGINE_TITLES
from fastrec.report.matrix import grid, markdown, matrix, print_matrix
from fastrec.report.schema import VARIANTS
from fastrec.runtime import BACKENDS

SMALL = RankerConfig(
    n_items=1200,
    n_categories=30,
    history_length=12,
    d=32,
    category_dim=8,
    n_heads=2,
    n_blocks=1,
    ffn=64,
    tower=(128, 128),
)


@pytest.mark.slow
def test_engines_agree_at_all_sizes() -> None:
    names, only = ("native", "torch_compile", "onnxruntime"), ("quantized",)
    report = matrix(
        config=SMALL, engines=names, only=only, requests=8, seconds_per_engine=0.05, threads=1
    )
    rows = {(r["variant"], r["engine"]): r for r in report["rows"]}
    assert set(rows) == {(v, e) for v in only for e in names}
    for (_, engine), row in rows.items():
        if engine == "torch_compile":
            assert row["why"]
            assert row["ms"] is None
            continue
        assert row["why"] is None
        assert row["sizes"] == len(grid(SMALL))
        assert row["ms"] > 0
        # fp32: the export's own tolerance. int8: a turned rounding moves scores of about 1 by less
        # than a hundredth in so small a tower.
        assert row["largest_error"] <= (1e-4 if row["precision"] == "fp32" else 0.05)
    json.dumps(report, allow_nan=False)
    console = Console(record=True, width=160)
    print_matrix(report, console)
    text = console.export_text()
    assert "ONNX Runtime" in text
    assert "compiles each size anew" in text
    assert markdown(report).count("\n| ") == 1 + 2 * len(only)


def test_engines_that_cannot_run_are_named_with_their_reason() -> None:
    assert set(BACKENDS) <= set(ENGINE_TITLES)
    row = dict.fromkeys(("largest_error", "same_top_10", "users", "sizes", "ms", "settings"))
    rows = [
        row | {"variant": v, "engine": e, "precision": "fp32", "why": f"no {e} here"}
        for v in VARIANTS
        for e in BACKENDS
    ]
    report = {"machine": machine_card(), "threads": 1, "rows": rows}
    console = Console(record=True, width=160)
    print_matrix(report, console)
    for text in (console.export_text(), markdown(report)):
        for engine in BACKENDS:
            assert f"- {ENGINE_TITLES[engine]}: no {engine} here" in text


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="engines: expected names among"):
        matrix(config=SMALL, engines=("abacus",))
    with pytest.raises(ArgumentError, match="only: expected names among"):
        matrix(config=SMALL, only=("huge",))
    with pytest.raises(ArgumentError, match="requests"):
        matrix(config=SMALL, requests=0)

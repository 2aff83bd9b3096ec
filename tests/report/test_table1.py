"""``table1`` end to end on a micro model: measured or explained, resumable, nothing constant."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastrec.data import generate
from fastrec.errors import ArgumentError
from fastrec.models import RankerConfig
from fastrec.report import Table1Settings, table1, validate
from fastrec.report import table as table_module
from fastrec.report.bench import bench
from fastrec.report.engines import specs_of
from fastrec.report.schema import VARIANTS
from fastrec.report.store import Store
from fastrec.report.terminal import render_variant

CONFIG = RankerConfig(
    n_items=81,
    n_categories=9,
    d=16,
    category_dim=8,
    n_blocks=1,
    n_heads=2,
    ffn=32,
    tower=(128, 128),
)


def micro(log: Path, **changes: Any) -> Table1Settings:
    values: dict[str, Any] = {
        "steps": 5,
        "recipe_steps": 1,
        "seconds_per_engine": 0.05,
        "engines": ("native", "torch", "onnxruntime"),
        "batches": (2,),
        "throughput_batches": (2,),
        "throughput_seconds": 0.01,
        "users": 32,
        "rival_users": 8,
        "catalogue_seconds": 0.5,
        "rss_requests": 1,
        "threads": 1,
    }
    return Table1Settings.make("demo", data=log, **(values | changes))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table1")
    generate(folder / "log.csv", n_users=60, n_items=80, n_categories=8)
    return folder


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, Any]:
    return table1(micro(work / "log.csv"), work / "out", model_config=CONFIG)


def test_every_row_is_measured_or_explained(report: dict[str, Any], work: Path) -> None:
    validate(report)
    assert json.loads((work / "out" / "table1.json").read_text()) == report
    assert {row["variant"] for row in report["rows"]} == set(VARIANTS)
    assert {row["engine"] for row in report["rows"]} == {"native", "torch", "onnxruntime"}
    for row in report["rows"]:
        measured = row["latency_ms"]["p50"] is not None
        assert measured or row["why"]["latency_ms"]
        if measured:
            assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
            assert row["throughput_rps"] > 0
            assert row["size_mb"] > 0
            assert row["rss_mb"] > 10
            assert row["gate"]["reason"] is None
            assert row["settings"]


def test_quality_is_that_of_the_data(report: dict[str, Any]) -> None:
    rows = {r["variant"]: r for r in report["rows"] if r["engine"] == "native"}
    baseline = rows["baseline"]
    low, high = baseline["ci95"]["ndcg_10"]
    assert 0 <= low <= baseline["ndcg_10"] <= high <= 1
    assert baseline["difference"] == {}
    difference, low, high = rows["quantized"]["difference"]["mrr"]
    assert low <= difference <= high
    assert difference == pytest.approx(rows["quantized"]["mrr"] - baseline["mrr"])


def test_pruning_and_int8_show_in_the_resources(report: dict[str, Any]) -> None:
    rows = {r["variant"]: r for r in report["rows"] if r["engine"] == "torch"}
    assert rows["pruned"]["nonzero_params_m"] < rows["baseline"]["nonzero_params_m"]
    assert rows["distilled"]["params_m"] <= 0.2 * rows["baseline"]["params_m"]


def test_reports_are_written(report: dict[str, Any], work: Path) -> None:
    out = work / "out"
    for name in ("table1.md", "report.html"):
        text = (out / name).read_text()
        assert all(title in text for title in ("torch eager fp32", "ONNX Runtime int8"))
    for name in ("latency", "throughput", "accuracy", "resources"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert str(work) not in (out / "table1.json").read_text()


def test_a_second_run_reuses_every_stage(report: dict[str, Any], work: Path) -> None:
    again = table1(micro(work / "log.csv"), work / "out", model_config=CONFIG)
    assert set(again["run"]["stages_reused"]) == {
        "data",
        "train",
        *(f"measure-{variant}" for variant in VARIANTS),
    }
    assert again["rows"] == report["rows"]


def test_a_gate_that_fails_leaves_null_and_why(
    work: Path, monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> None:
    right = table_module.EngineBuilder.reference

    def wrong(self: Any, network: str, inputs: Any) -> Any:
        return 1.5 * right(self, network, inputs)

    monkeypatch.setattr(table_module.EngineBuilder, "reference", wrong)
    settings = micro(work / "log.csv", engines=("torch",), seconds_per_engine=0.06)
    rows = table1(settings, work / "out", model_config=CONFIG)["rows"]
    failed = next(row for row in rows if row["variant"] == "baseline")
    assert failed["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert failed["throughput_rps"] is None
    assert failed["calls"] == 0
    assert "differ from fp32 torch" in failed["why"]["latency_ms"]


def test_data_larger_than_the_tables_is_refused(work: Path) -> None:
    settings = micro(work / "log.csv")
    small = RankerConfig(n_items=5, n_categories=9, d=16, tower=(16,))
    with pytest.raises(ArgumentError, match="n_items"):
        table1(settings, work / "small", model_config=small)


def test_a_stage_cut_by_an_interruption_is_done_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.stage("x", "key", lambda: [1]) == [1]
    assert store.stage("x", "key", lambda: [2]) == [1]
    assert store.stage("x", "other", lambda: [2]) == [2]
    (store.folder / "x.json").write_text('{"key": "oth')
    assert store.stage("x", "other", lambda: [3]) == [3]


def test_bench_times_a_saved_model(report: dict[str, Any], work: Path) -> None:
    path = work / "out" / "variants" / "pruned_quantized"
    found = bench(path, batches=(1,), seconds_per_engine=0.05, threads=1)
    assert [row["engine"] for row in found["rows"]] == ["native", "torch"]
    assert found["rows"][0]["precision"] == "int8"
    assert found["rows"][0]["latency_ms"]["p50"] > 0


def test_bench_refuses_unknown_names(work: Path) -> None:
    with pytest.raises(ArgumentError, match="engines"):
        bench(work / "out" / "variants" / "baseline", engines=("abacus",))


def test_the_demo_shows_two_variants_before_it_makes_the_others(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Table1Settings, "quick", True)
    made: dict[str, set[str]] = {}
    console = Console(file=io.StringIO(), width=80, markup=False)

    def measured(variant: str, found: Any) -> None:
        made[variant] = {path.name for path in (work / "demo" / "variants").iterdir()}
        render_variant(variant, found, console)

    settings = micro(work / "log.csv")
    report = table1(settings, work / "demo", model_config=CONFIG, measured=measured)
    validate(report)
    assert tuple(made) == VARIANTS
    assert made["quantized"] == {"baseline", "quantized"}
    for row in report["rows"]:
        assert row["latency_ms"]["p50"] is not None, row["why"]
        assert "--full" in row["why"]["rss_mb"]
        rival = row["engine"] == "onnxruntime"
        assert (row["throughput_rps"] is None) == rival
        assert (row["mrr"] is None) == rival
        assert not rival or "--full" in row["why"]["throughput_rps"]
    assert console.file.getvalue().count("fastrec native") == len(VARIANTS)  # type: ignore[attr-defined]


def test_the_demo_leaves_slow_rows_to_the_full_run() -> None:
    short, full = Table1Settings.make(), Table1Settings.make(full=True)
    assert short.quick
    assert not full.quick
    for variant in VARIANTS:
        left = {spec.name for spec in specs_of(variant, full)}
        kept = {spec.name for spec in specs_of(variant, short)}
        assert kept <= left
        assert {"native", "torch", "onnxruntime", "openvino"} <= {n.split("-")[0] for n in kept}
    assert "torch_compile-fp32" not in {spec.name for spec in specs_of("pruned", short)}
    assert short.seconds_per_engine < full.seconds_per_engine

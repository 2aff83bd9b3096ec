"""What a plan's steps are said to cost, and ``fastrec explain`` of a saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import fastrec
from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, ShapeError
from fastrec.exporters.model_spec import spec_of
from fastrec.info import explain
from fastrec.kernels._compiled import reason_missing
from fastrec.measure.ceilings import Ceilings
from fastrec.models import Ranker, RankerConfig
from fastrec.plotting import png
from fastrec.report.profile import plot_profile, table
from fastrec.runtime import load_engine
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Buffer, Extent, View
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.native.program import Program
from fastrec.spec import InputField, InputSpec

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=33, d=32, category_dim=8, ffn=48, tower=(40, 24)
)


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return Ceilings(1, seconds=0.002)


@pytest.fixture(scope="module", params=["float", "int8"])
def engine(request: pytest.FixtureRequest) -> PlanEngine:
    torch.manual_seed(1)
    model = Ranker(CONFIG).eval()
    inputs = tuple(map(torch.from_numpy, sample(2, 33, 11)))
    if request.param == "int8":
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    spec = spec_of(model, inputs)
    plan = lower(model, inputs, spec)
    optimise(plan)
    return PlanEngine.build(
        plan, backend="native", precision="fp32", threads=1, spec=spec, rows=[], versions={}
    )


def sample(batch: int, length: int, candidates: int) -> tuple[np.ndarray, ...]:
    return spec_of(Ranker(CONFIG), ()).sample({"B": batch, "L": length, "m": candidates})


def rows_of(engine: PlanEngine, *args: Any, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["module"]: row for row in engine.profile(*args, **options)}


def test_bytes_and_multiply_adds(engine: PlanEngine) -> None:
    inputs = list(sample(2, 20, 7))
    inputs[3] = np.array([5, 0])
    rows = rows_of(engine, inputs)
    int8 = rows["tower.0"]["op"] == "sparse_int8_linear"
    tower = rows["tower.0"]
    assert tower["macs"] == 2 * 7 * 96 * 40
    assert tower["density"] == 1
    assert tower["written_bytes"] == 2 * 7 * 40 * (1 if tower["written_bytes"] == 560 else 4)
    if not int8:
        assert tower["read_bytes"] == 4 * (2 * 7 * 96 + 96 * 40 + 40)
        assert tower["bytes"] == 4 * (96 * 40 + 40)
    # Padding is skipped; a length of 0 stands for all 20 keys.
    attention = rows["cross_attention"]
    assert attention["macs"] == 2 * (5 + 20) * 7 * 32
    assert attention["read_bytes"] == 4 * (2 * 7 * 32 + 2 * (5 + 20) * 32) + 2 * 8
    # Of the table, the rows that are read: here the candidates' (the last of that name).
    gather = rows["item_embedding"]
    row = 32 + 4 if gather["op"] == "int8_embedding" else 4 * 32
    assert gather["read_bytes"] == 2 * 7 * (8 + row)
    assert gather["written_bytes"] == 2 * 7 * 4 * 32
    assert gather["bytes"] == 300 * row


def test_a_loaded_engine_counts_the_same(engine: PlanEngine, tmp_path: Path) -> None:
    request = sample(2, 33, 11)
    engine.save(tmp_path / "engine.fastrec")
    counted = ("module", "op", "density", "read_bytes", "written_bytes", "macs")
    with load_engine(tmp_path / "engine.fastrec") as loaded:
        for own, theirs in zip(engine.profile(request), loaded.profile(request), strict=True):
            assert [own[k] for k in counted] == [theirs[k] for k in counted]


def test_what_is_broadcast_counts_once() -> None:
    size = Extent.of("B")
    vector = Buffer("float32", (size,), "input")
    spread = View(vector, (size, Extent(50)), (Extent(1), Extent(0)))
    out = Buffer("float32", (size, Extent(50))).view()
    step = steps.map(x=[spread, spread], y=out, program=[("mul_f32", 0, 1)])
    engine = PlanEngine.build(
        Program(("B",), [vector], [step], [out]),
        spec=InputSpec((InputField("x", ("B",), "float32"),)),
        backend="native", precision="fp32", threads=1, rows=[], versions={},
    )  # fmt: skip
    (row,) = engine.profile([np.ones(3, np.float32)])
    assert (row["read_bytes"], row["written_bytes"], row["macs"]) == (12, 600, None)


def test_times_and_kernels(engine: PlanEngine) -> None:
    rows = engine.profile(sample(1, 33, 50), calls=9)
    assert len(rows) == len(engine.plan()["steps"])
    for row in rows:
        assert 0 <= row["us"] <= row["us_median"]
        assert "limit" not in row
    isas = {row["kernel"] for row in rows if row["op"] in ("layer_norm", "padded_attention")}
    assert isas == {
        f"cpu/{kernels.registry()[op].kernel_isa()}"
        for op in ("layer_norm_quantize", "padded_attention")
    }


def test_limits(engine: PlanEngine, ceilings: Ceilings) -> None:
    ceilings.peaks["int8"] = ceilings.peaks["int8"] or 100.0
    rows = engine.profile(sample(1, 33, 50), limits=ceilings)
    for row in rows:
        assert row["limit"] in ("fp32 peak", "int8 peak", "bandwidth")
        assert row["limit_us"] >= 0
        assert row["us"] == 0 or row["of_limit"] == pytest.approx(row["limit_us"] / row["us"])
        if row["limit"] != "bandwidth":
            peak = ceilings.peaks[row["limit"].split()[0]]
            assert row["limit_us"] == pytest.approx(2 * row["macs"] / (peak * 1e3))
    assert any(row["limit"] != "bandwidth" for row in rows)


def test_a_peak_that_the_cpu_lacks_is_no_limit(engine: PlanEngine, ceilings: Ceilings) -> None:
    peaks = dict(ceilings.peaks)
    try:
        ceilings.peaks.update(dict.fromkeys(peaks, 0.0))
        rows = rows_of(engine, sample(1, 9, 5), limits=ceilings)
    finally:
        ceilings.peaks.update(peaks)
    assert (rows["tower.0"]["limit"], rows["tower.0"]["of_limit"]) == (None, None)
    assert rows["final_norm"]["limit"] == "bandwidth"
    assert table(list(rows.values()), ceilings).row_count == len(rows)
    assert png(plot_profile(list(rows.values()))).startswith(b"\x89PNG")


def test_a_rate_is_measured_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = Ceilings(1, seconds=0.001)
    asked: list[int] = []
    monkeypatch.setattr(ceilings, "bandwidth", lambda size: asked.append(size) or 7.0)
    assert [ceilings.reading(size) for size in (0, 4096, 8191, 8192, 70000)] == [7.0] * 5
    assert asked == [4096, 8192, 65536]


def test_compiling_measures_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ceilings, "__post_init__", lambda self: pytest.fail("measured"))
    model = nn.Sequential(nn.Linear(8, 4))
    engine = fastrec.compile(
        model, (torch.randn(2, 8),), backend="native", settings={"executor": "plan"}
    )
    assert isinstance(engine, PlanEngine)
    assert engine.describe()[0]["us_median"] >= engine.describe()[0]["us"]


def test_bad_requests_are_refused(engine: PlanEngine) -> None:
    inputs = sample(1, 9, 5)
    for calls in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="calls: expected a positive integer"):
            engine.profile(inputs, calls=calls)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="cand_item"):
        engine.profile((*inputs[:4], inputs[4][0], inputs[5]))


# fastrec explain.


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(explain)
    return app


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    fastrec.save(Ranker(CONFIG).eval(), folder / "model")
    return folder / "model"


def test_explain_a_saved_model(
    tmp_path: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ceilings.__init__, "__defaults__", (0.002,))
    target, plot = tmp_path / "rows.json", tmp_path / "profile.png"
    arguments = [str(saved(tmp_path)), "--json", str(target), "--plot", str(plot)]
    compiled = fastrec.compile
    monkeypatch.setattr(
        fastrec, "compile", lambda *a, **k: compiled(*a, **k, settings={"executor": "plan"})
    )
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "tower.0" in done.output
    assert "% of limit" in done.output
    rows = json.loads(target.read_text())
    tower = next(row for row in rows if row.get("module") == "tower.0")
    assert tower["macs"] == 50 * 96 * 40
    assert {"limit", "of_limit", "us_median", "read_bytes", "written_bytes"} <= tower.keys()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_explain_op_by_op(
    tmp_path: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = fastrec.compile
    monkeypatch.setattr(
        fastrec, "compile", lambda *a, **k: compiled(*a, **k, settings={"executor": "torch"})
    )
    model = str(saved(tmp_path))
    done = CliRunner().invoke(app, [model], catch_exceptions=False, env={"COLUMNS": "200"})
    assert "tower.0" in done.output
    with pytest.raises(BackendError, match="--plot: this model does not run as one plan here"):
        CliRunner().invoke(app, [model, "--plot", "x.png"], catch_exceptions=False)


@pytest.mark.parametrize("arguments", [["m", "--plot", "x.pdf"], ["--op", "x", "--plot", "x.png"]])
def test_explain_refuses_plots_that_it_cannot_draw(app: typer.Typer, arguments: list[str]) -> None:
    with pytest.raises(ArgumentError, match="--plot: expected"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)

"""``make gpu-report``: without a GPU it runs to its end and says that nothing was measured; what it
does with figures is tried with figures made up here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
SCRIPT = BENCH / "gpu_report.py"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would be measured")


@pytest.fixture(autouse=True)
def bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in [n for n in sys.modules if n in ("gate", "gpu_report") or n.split(".")[0] == "gpu"]:
        del sys.modules[name]


def dry_run(out: Path, *sections: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--seconds", "900"]
    run = subprocess.run(
        [*command, *(["--sections", *sections] if sections else [])],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:] + (out / "log.txt").read_text()[-4000:]
    assert sorted(p.name for p in out.iterdir()) == ["gpu_report.json", "gpu_report.md", "log.txt"]
    assert (out / "gpu_report.md").read_text().startswith("# No GPU")
    for name in ("gpu_report.json", "log.txt"):
        assert str(BENCH.parent) not in (out / name).read_text()
    report: dict[str, Any] = json.loads((out / "gpu_report.json").read_text())
    assert report["gpu"] is None
    assert {goal["verdict"] for goal in report["goals"]} == {"not measured"}
    for row in report["rows"]:
        assert "device_us" not in row
        assert "host_us" not in row
    return report


def tried(rows: list[dict[str, Any]], what: str) -> dict[str, str]:
    """What was said of each engine."""
    return {row["engine"]: row["why"] for row in rows if row["what"].startswith(what)}


@no_gpu
def test_a_section_is_tried_on_small_inputs_and_leaves_bounds(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed (fastrec-kernels[cuda])")
    rows = dry_run(tmp_path, "products")["rows"]
    assert all(row["bound_us"] > 0 for row in rows)
    said = tried(rows, "int8 linear M=4096 K=N=4096, 2:4")
    assert said["fastrec, Triton"].startswith("right on small inputs")
    assert said["torch._int_mm"].startswith("right on small inputs")
    assert "runs on a GPU" in said["fastrec, CUDA C++"]
    assert "_cslt_compress" in said["cuSPARSELt 2:4"]


@no_gpu
@pytest.mark.slow
def test_the_dry_run_tries_every_section(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed (fastrec-kernels[cuda])")
    report = dry_run(tmp_path)
    from gpu import SECTIONS

    assert [s["name"] for s in report["sections"]] == [s.name for s in SECTIONS if s.dry]
    rows = report["rows"]
    for batch in (1, 8, 64):
        mine = [row for row in rows if row["what"] == f"ranker B={batch}"]
        assert [row["launches"] for row in mine] == [5, 5, 5]
        assert all(row["bound_us"] > 0 for row in mine)
    for what in ("attention B=8", "attention B=64", "a small ranker"):
        said = tried(rows, what)
        mine = {why for engine, why in said.items() if engine.startswith("fastrec")}
        assert mine == {"right on small inputs; not measured: torch sees no CUDA device"}, said
    passed = [row["passed"] for row in rows if row["engine"] == "pytest"]
    assert sum(passed) > 0


def test_a_crash_and_a_hang_cost_their_section_alone(tmp_path: Path) -> None:
    import gpu_report
    from gpu import Section

    log = tmp_path / "log.txt"
    crash = Section("no such section", "", 1)
    found = gpu_report.run(crash, tmp_path, 60, False, log, str(tmp_path))
    assert found["why"] == "ended with status 1"
    assert "StopIteration" in log.read_text()
    slow = next(s for s in gpu_report.SECTIONS if s.name == "ranker-1")
    found = gpu_report.run(slow, tmp_path, -4.5, False, log, str(tmp_path))
    assert found["why"].startswith("cut off")
    assert found["seconds"] < 10
    assert found["rows"] == []


@pytest.fixture
def sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that measures, with replays that take as long as their calls say."""
    from gpu import sheet as module
    from gpu.timing import Replay

    class Told(Replay):
        def ns(self) -> float:
            return float(self.graph)

    def replay_of(calls: list[Any]) -> Replay:
        return Told(calls[0].ns, len(calls))

    monkeypatch.setattr(module.Replay, "of", staticmethod(replay_of))
    monkeypatch.setattr(module, "host_us", lambda call: 7.0)
    made = module.Sheet(tmp_path / "rows", "section", 60, gpu=True, out=tmp_path)
    made.device = torch.device("cpu")
    return made


class Call:
    """Returns a value, and says how long it took."""

    def __init__(self, value: torch.Tensor, ns: float) -> None:
        self.value, self.ns = value, ns

    def __call__(self) -> torch.Tensor:
        return self.value


def test_engines_are_right_before_they_are_timed_and_timed_in_turn(sheet: Any) -> None:
    from gpu.sheet import Contender, Work

    def takes(us: float, factor: float = 1.0, **options: Any) -> Contender:
        return Contender(lambda x: Call(x * factor, 1e3 * us), **options)

    contenders = {
        "fastrec, a": takes(20),
        "fastrec, b": takes(10),
        "rival": takes(30),
        "wrong": takes(1, factor=1.1),
        "other": takes(40, factor=2.0, expected=lambda x: 2 * x, note="other work"),
        "host": takes(1, device=False),
    }

    def broken(x: torch.Tensor) -> Any:
        raise ModuleNotFoundError("no engine\nof this name")

    contenders["missing"] = Contender(broken)
    work = Work(4800, 1000, "bf16")
    sheet.compare("what", work, lambda: (torch.ones(8),), contenders, lambda x: x)
    rows = {r["engine"]: r for r in map(json.loads, sheet.file.read_text().splitlines())}
    assert list(rows) == list(contenders)
    assert {r["section"] for r in rows.values()} == {"section"}
    assert rows["fastrec, b"]["device_us"] == pytest.approx(10)
    assert rows["fastrec, b"]["gb_per_s"] == pytest.approx(0.48)
    assert rows["rival"]["fastrec_is_faster_by"]["x"] == pytest.approx(3)
    assert rows["other"]["fastrec_is_faster_by"]["x"] == pytest.approx(4)
    assert rows["other"]["note"] == "other work"
    assert "device_us" not in rows["wrong"]
    assert rows["wrong"]["why"].startswith("AssertionError: wrong: error 0.1")
    assert rows["missing"]["why"] == "ModuleNotFoundError: no engine"
    assert rows["host"]["host_us"] == 7.0
    assert "device_us" not in rows["host"]


def made_up() -> list[dict[str, Any]]:
    from gpu.goals import LONG, SHORT, linear

    def timed(what: str, engine: str, us: float, x: float | None = None) -> dict[str, Any]:
        row = {"section": "s", "what": what, "engine": engine, "device_us": us, "host_us": 1.0}
        row |= {"gb_per_s": 2400.0, "gop_per_s": 10.0, "bound_us": 1.0, "dtype": "bf16"}
        row |= {"macs": 10, "moved": 10, "note": "a|b"}
        faster = {} if x is None else {"fastrec_is_faster_by": {"x": x, "ci95": [x / 2, 2 * x]}}
        return row | faster

    rows = [{"section": "s", "ceiling": "copy", "per_s": 4e12}]
    rows += [{"section": "s", "ceiling": "bf16", "per_s": 9e14}]
    rows += [timed(f"{LONG}, forward", "fastrec, Triton", 100.0)]
    rows += [timed(f"{LONG}, forward", "FlexAttention, compiled", 300.0, 3.0)]
    rows += [timed(SHORT, "fastrec, Triton", 5.0), timed(SHORT, "SDPA flash", 5.0, 1.0)]
    rows += [
        timed(linear("density 0.5"), name, us) for name, us in (("fastrec", 4), ("_int_mm", 8))
    ]
    rows += [timed("ranker B=1", "fastrec, int8", 50.0)]
    rows += [
        {"section": "s", "what": "launches a request, bf16", "engine": "fastrec", "launches": 9}
    ]
    rows += [{"section": "s", "what": "kernels compiled", "engine": "fastrec", "compiled": 0}]
    return rows


def test_goals_are_judged_on_the_rows(tmp_path: Path) -> None:
    from gpu.page import judged

    found = {line["goal"]: line for line in judged(made_up())}
    assert found["long attention, times FlexAttention"]["verdict"] == "reached"
    assert found["long attention, times FlexAttention"]["measured"] == 3.0
    assert found["long attention, times SDPA flash"]["verdict"] == "not measured"
    assert found["long attention, share of the copy's bytes/s"]["measured"] == pytest.approx(0.6)
    assert found["short attention, times SDPA flash"]["verdict"] == "missed"
    assert found["int8 linear, 50 % sparse, times _int_mm"]["measured"] == 2.0
    assert found["ranker int8 B=1, device us"]["verdict"] == "reached"
    assert found["launches a request, at most"]["verdict"] == "missed"
    assert found["kernels compiled for 1,000 lengths"]["verdict"] == "reached"


def test_the_page_and_the_plots_hold_the_figures(tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed (fastrec-kernels[report])"
    )
    from gpu import pictures
    from gpu.page import judged, markdown

    rows = made_up()
    report = {
        "gpu": "GPU",
        "versions": {"torch": "2"},
        "rows": rows,
        "goals": judged(rows),
        "sections": [{"name": "s", "seconds": 1.0, "why": "cut off"}],
    }
    page = markdown(report)
    assert "ceiling, copy: 4,000 GB/s" in page
    assert "| 3.00 (1.50-6.00) |" in page
    assert "1 s: cut off" in page
    assert "- launches a request, bf16: launches 9" in page
    cells = {line.count("|") for line in page.splitlines() if line.startswith("| ")}
    assert cells == {5, 10}, "a table is broken"
    files = pictures.draw(report, tmp_path)
    assert [f.name for f in files] == ["gpu_speedups.png", "gpu_roofline.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    assert pictures.draw(report | {"rows": []}, tmp_path) == []


def test_rounds_change_the_order_and_the_first_does_not_count() -> None:
    from gpu.timing import Replay, in_turn

    order: list[str] = []

    class Named(Replay):
        def ns(self) -> float:
            order.append(self.graph)
            return float(len(order))

    taken = in_turn([Named("a", 1), Named("b", 1)], rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert np.array_equal(taken[0].ns[:, 0], [4, 5, 8])

"""The bench runs end to end, refuses wrong engines, resumes, judges fairly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrec import kernels
from fastrec.kernels._compiled import reason_missing

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "bench_kernels.py"), "--out", str(out), "--quick"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(reason_missing() is not None, reason="nothing compiled to measure")
def test_a_quick_run_writes_every_file(tmp_path: Path) -> None:
    options = ("--ops", "int8_embedding,grouped_linear", "--threads", "1")
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["op"] for row in report["rows"]} == {"int8_embedding", "grouped_linear"}
    assert {row["mode"] for row in report["rows"]} == {"forward", "training"}
    assert {goal["verdict"] for goal in report["goals"]} == {"not measured"}
    assert not [row for row in report["rows"] if row["why_not_timed"]]
    ours = [row for row in report["rows"] if row["engine"] == "fastrec" and "limit_us" in row]
    assert all(row["bandwidth_gbs"] > 0 and row["us"]["p50"] > 0 for row in ours)
    assert "## Roofline" in (tmp_path / "kernels.md").read_text()
    for name in ("kernels_roofline_1.png", "kernels_speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "kernels.rows.jsonl").exists()


def test_an_unknown_op_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--ops", "int9_embedding")
    assert done.returncode == 2
    assert "int9_embedding" in done.stderr


def test_every_op_has_rivals_and_an_op_without_is_an_error() -> None:
    import rivals

    for op_id in kernels.OP_IDS:
        assert callable(rivals.load(op_id).rivals)
    with pytest.raises(LookupError, match=r"bench/rivals/nothing\.py"):
        rivals.load("nothing")


def test_a_journal_goes_on_where_a_line_was_cut_off(tmp_path: Path) -> None:
    from bench_kernels import Journal

    path, head = tmp_path / "rows.jsonl", {"cpu": "x"}
    journal = Journal(path, head, resume=False)
    journal.add("a", [{"us": 1}])
    journal.add("b", [{"us": 2}])
    path.write_text(path.read_text()[:-5])
    again = Journal(path, head, resume=True)
    assert again.done == {"a": [{"us": 1}]}
    again.add("b", [{"us": 3}])
    assert Journal(path, head, resume=True).done == {"a": [{"us": 1}], "b": [{"us": 3}]}
    with pytest.raises(Exception, match="another machine"):
        Journal(path, {"cpu": "y"}, resume=True)
    assert Journal(path, head, resume=False).done == {}


def test_the_gate_names_what_is_wrong() -> None:
    from gate import why_wrong

    right = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))

    def verdict(output: object, engine: str = "rival") -> str | None:
        return why_wrong(lambda: output, right, lambda x: x, engine, "fp32")[1]

    assert verdict(right.numpy()) is None
    assert verdict((right,)) is None
    assert verdict(right * 1.01) == "wrong: error 0.01 > 0.0001"
    assert verdict(right * 1.01, "rival int8") is None
    assert verdict(right[:1]) == "wrong: error inf > 0.0001"
    assert verdict(right * torch.nan) == "wrong: error inf > 0.0001"
    error, why = why_wrong(lambda: 1 / 0, right, lambda x: x, "rival", "fp32")
    assert (error, why) == (None, "failed: ZeroDivisionError: division by zero")


def row(engine: str, p50: float, threads: int = 1, **more: object) -> dict[str, object]:
    labels = {"rows": 50, "inputs": 1024, "outputs": 1024, "density": 1.0}
    return {
        "op": "sparse_int8_linear",
        "case": "M50",
        "labels": labels,
        "threads": threads,
        "mode": "forward",
        "engine": engine,
        "us": {"p50": p50},
        "round_us": [p50 * 0.99, p50, p50 * 1.01],
        "fastrec_is_faster_by": {"x": p50 / 100, "ci95": [p50 / 101, p50 / 99]},
        **more,
    }


def test_goals_are_judged_against_the_fastest_rival_and_show_the_limit() -> None:
    import goals

    limits = {"limit_us": 95.0, "limited_by": "compute", "peak_share": 0.95}
    rows = [
        row("fastrec", 100, **limits),
        row("onnxruntime int8", 130),
        row("torch int8 (FBGEMM)", 200),
        row("torch int8 sparse", 50),
        row("torch fp32", 60),
        row("fastrec", 60, 2, **limits | {"limit_us": 48.0}),
    ]
    judged = {line["goal"]: line for line in (g.judge(rows) for g in goals.declared([1, 2]))}
    peak = judged["sparse_int8_linear M=50, density 1: share of the vpdpbusd peak, 1 thread"]
    assert peak["verdict"] == "reached"
    assert peak["ci95"][0] < peak["measured"] == 0.95 < peak["ci95"][1]
    assert peak["limit"] == pytest.approx(1)
    rival = judged["sparse_int8_linear M=50, density 1 over the best dense INT8, 1 thread"]
    assert rival["verdict"] == "missed"
    assert rival["measured"] == pytest.approx(1.3)
    assert rival["limit"] == pytest.approx(130 / 95)
    assert "onnxruntime int8" in rival["limited_by"]
    two = judged["sparse_int8_linear M=50, density 1: 2 threads against 1"]
    assert two["measured"] == pytest.approx(100 / 60)
    assert two["limit"] == pytest.approx(95 / 48)
    assert two["verdict"] == "missed"
    assert judged["attention cost L=8192 over 4096, 1 thread"]["verdict"] == "not measured"


def test_pytest_benchmark_collects_every_case_that_the_bench_has() -> None:
    import bench_ops
    import rivals
    from measuring import cases

    measured = [case for case in cases(None, [1], quick=False) if case.mode == "training"]
    collected = {parameters.id for parameters in bench_ops.TRAINED}
    assert collected == {f"{case.spec.op_id}-{case.sample.name}" for case in measured}
    # Where no rival's gradients are affordable, ours is all there is to compare and to time.
    case = next(c for c in measured if c.key.startswith("attention_map_kl B1-H4-L8192"))
    args, kwargs = case.sample.make()
    assert list(rivals.load(case.spec.op_id).training(args, kwargs, 1)) == ["fastrec"]

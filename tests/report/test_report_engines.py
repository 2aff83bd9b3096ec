"""Building, the correctness gate and timing: what fails is a reason, what is timed is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastrec.errors import BackendError
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.report import engines as module
from fastrec.report.engines import Built, EngineBuilder, Spec, attempt, specs_of, third_party_output
from fastrec.report.measuring import (
    best_throughput,
    cores_of_others,
    latency_of,
    native_ratio,
    time_engines,
)
from fastrec.report.networks import count_parameters, float_reference
from fastrec.report.plots import COLOURS
from fastrec.report.schema import GPU_ENGINES, KNOWN_ENGINES, VARIANTS
from fastrec.report.settings import Table1Settings
from fastrec.runtime import available_backends

INPUTS = (np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 12),)


class FakeEngine:
    """Scores are the inputs times ``factor``; a call takes ``ms`` on the fake clock."""

    spin_s = 0.0
    precision = "fp32"

    def __init__(self, clock: FakeClock | None = None, ms: float = 1.0, factor: float = 1.0):
        self.clock, self.ms, self.factor, self.calls = clock, ms, factor, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.clock is not None:
            self.clock.now += int(self.ms * 1e6)
        return x * self.factor

    def describe(self) -> list[dict[str, Any]]:
        return [{"setting": "fake setting", "chosen": True}]

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0"}

    def throughput(self, requests: Any, *, seconds: float) -> float:
        return 100.0 / len(requests[0][0])

    def close(self) -> None:
        self.calls = -1


class FakeClock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def builder(tmp_path: Path) -> EngineBuilder:
    identity = nn.Identity()
    log = tmp_path / "third_party.log"
    return EngineBuilder({"net": identity}, {2: [INPUTS]}, [], 1, log)


def build_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compile_: Callable[..., Any], name: str = "x"
) -> Built:
    monkeypatch.setattr(module, "compile", compile_)
    return builder(tmp_path).built(Spec(name, "fp32", "net", "fp32"), 2, (2,))


def test_a_right_engine_passes_its_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = build_with(monkeypatch, tmp_path, lambda *a, **k: FakeEngine())
    assert built.usable
    assert built.gate is not None
    assert built.gate["reason"] is None
    assert "fake setting" in built.settings()
    assert "fake 1.0" in built.settings()


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = build_with(monkeypatch, tmp_path, lambda *a, **k: FakeEngine(factor=1.1))
    assert not built.usable
    assert built.why is not None
    assert "differ from fp32 torch" in built.why
    assert isinstance(built.engine, FakeEngine)
    before = built.engine.calls
    assert time_engines({"x": built}, [INPUTS], batch=2, seconds_per_engine=0.01) == {}
    assert built.engine.calls == before


@pytest.mark.parametrize("error", [BackendError("no such op"), ZeroDivisionError("in C++")])
def test_a_crash_in_a_build_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def crash(*args: Any, **keywords: Any) -> Any:
        raise error

    built = build_with(monkeypatch, tmp_path, crash)
    assert built.engine is None
    assert built.why is not None
    assert str(error) in built.why


def test_ctrl_c_is_no_reason() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("x", interrupt)


def test_third_party_output_goes_to_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    with third_party_output(log):
        os.write(1, b"chatter\n")
        os.write(2, b"warning\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
    assert log.read_text() == "chatter\nwarning\n"


def test_shared_engines_are_built_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[FakeEngine] = []

    def make(*args: Any, **keywords: Any) -> FakeEngine:
        made.append(FakeEngine())
        return made[-1]

    monkeypatch.setattr(module, "compile", make)
    shop = builder(tmp_path)
    first = shop.built(Spec("torch_compile", "fp32", "net", "fp32"), 2, (2,))
    second = shop.built(Spec("torch_compile", "fp32", "net", "fp32", "another row"), 2, (2,))
    assert len(made) == 1
    shop.close([first, second])
    assert made[0].calls >= 0
    assert second.spec.note == "another row"


def _timed(ms: dict[str, float]) -> dict[str, Any]:
    clock = FakeClock()
    built = {
        name: Built(Spec(name, "int8", "net", None), FakeEngine(clock, value))  # type: ignore[arg-type]
        for name, value in ms.items()
    }
    samples = time_engines(built, [INPUTS], batch=2, seconds_per_engine=0.5, clock=clock)
    return {"built": built, "samples": samples}


@pytest.mark.parametrize("ms", [1.0, 2.5])
def test_latency_is_what_the_clock_says(ms: float) -> None:
    samples = _timed({"native": ms})["samples"]["native"]
    assert latency_of(samples) == pytest.approx({"p50": ms, "p95": ms, "p99": ms})


@pytest.mark.parametrize(("native", "expected"), [(1.0, 0.5), (3.0, 1.5)])
def test_ratio_is_against_the_best_rival(native: float, expected: float) -> None:
    made = _timed({"native": native, "torch": 9.0, "openvino": 2.0})
    line = native_ratio("quantized", 2, made["samples"], made["built"])
    assert line["ratio"] == pytest.approx(expected)
    assert line["rival"] == "OpenVINO int8"
    assert line["ci95"] == pytest.approx([expected, expected])


@pytest.mark.parametrize("names", [["native"], ["torch"]])
def test_no_ratio_without_both_sides(names: list[str]) -> None:
    made = _timed(dict.fromkeys(names, 1.0))
    line = native_ratio("quantized", 2, made["samples"], made["built"])
    assert line["ratio"] is None
    assert line["why"]


def test_throughput_counts_users_and_keeps_the_best() -> None:
    built = Built(Spec("native", "int8", "net", None), FakeEngine())  # type: ignore[arg-type]
    requests = {1: [(np.zeros(1),)], 8: [(np.zeros(8),)]}
    found, why = best_throughput(built, requests, (1, 8), 0.01)
    assert why is None
    assert found == {"rps": 100.0, "batch": 1, "all": {"1": 100.0, "8": 100.0}}


def test_cores_of_others_leaves_out_our_own() -> None:
    assert cores_of_others((100.0, 10.0), (108.0, 14.0), 4.0) == 1.0
    assert cores_of_others((100.0, 10.0), (104.0, 14.0), 4.0) == 0.0
    assert cores_of_others(None, (1.0, 1.0), 4.0) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_meets_every_engine_asked_for(variant: str) -> None:
    specs = specs_of(variant, Table1Settings(full=True))
    assert {s.engine for s in specs} == {
        "native",
        "torch",
        "torch_compile",
        "onnxruntime",
        "openvino",
    }
    assert len({s.name for s in specs}) == len(specs)
    gpu = specs_of(variant, Table1Settings(engines=GPU_ENGINES))
    assert {s.engine for s in gpu} == set(GPU_ENGINES)
    only = specs_of(variant, Table1Settings(engines=("native",)))
    assert [s.engine for s in only] == ["native"]


def test_an_engine_without_its_machine_is_a_row_with_a_reason(tmp_path: Path) -> None:
    if available_backends()["tensorrt"] is None:
        pytest.skip("TensorRT runs here")
    spec = specs_of("baseline", Table1Settings(engines=("tensorrt",)))[0]
    shop = builder(tmp_path)
    shop.networks = {"baseline": nn.Identity()}
    built = shop.built(spec, 2, (2,))
    assert not built.usable
    assert "tensorrt" in str(built.why)


def test_float_reference_of_int8_layers() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    table = nn.Embedding(10, 32)
    with torch.no_grad():
        linear.weight[:32, :4] = 0
    x = torch.randn(64, 32)
    int8 = SparseInt8Linear.from_float(linear, calibration=[x], activation="relu")
    model = nn.Sequential(Int8Embedding.from_float(table), int8)
    twin = float_reference(model)
    assert not any(isinstance(m, SparseInt8Linear | Int8Embedding) for m in twin.modules())
    ids = torch.arange(10)
    expected = torch.relu(linear(table(ids)))
    # Weights and table rounded to 127 steps: off by far less than a tenth of the spread.
    assert (twin(ids) - expected).std() < 0.05 * expected.std()
    every, kept = count_parameters(model)
    assert every == 10 * 32 + 32 * 64 + 64
    assert kept <= every - 32 * 4


def test_every_engine_has_rows_in_each_variant_and_a_colour_in_the_plots() -> None:
    for variant in VARIANTS:
        named = {
            s.engine for s in specs_of(variant, Table1Settings(engines=KNOWN_ENGINES, full=True))
        }
        assert named == set(KNOWN_ENGINES)
    assert set(COLOURS) == set(KNOWN_ENGINES)

"""Commands take what other commands wrote, and models of one's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import fastrec
from fastrec.errors import ArgumentError, ArtifactError
from fastrec.exporters.model_spec import spec_of
from fastrec.info import explain
from fastrec.kernels._compiled import reason_missing
from fastrec.model_source import (
    ModelSource,
    attribute,
    calibration_batches,
    find_model,
    served_path,
)
from fastrec.models import Ranker, RankerConfig
from fastrec.report.cli import bench
from fastrec.report.load_cli import loadtest
from fastrec.runtime import load_engine
from fastrec.runtime.cli import compile, export
from fastrec.serving.simulate.cli import simulate
from fastrec.train import save_model

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
CONFIG = RankerConfig(
    n_items=200, n_categories=9, history_length=8, d=32, category_dim=8, n_blocks=1, n_heads=2,
    ffn=32, tower=(32,),
)  # fmt: skip


class Own(nn.Module):
    """Scores [B] from features [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features).squeeze(-1)


def features(batch: int = 4) -> torch.Tensor:
    return torch.ones(batch, 6)


NOT_A_MODEL = 7
OWN = f"{__file__}:Own"


@pytest.fixture(scope="module")
def network() -> Ranker:
    torch.manual_seed(0)
    return Ranker(CONFIG).eval()


@pytest.fixture(scope="module")
def request_of(network: Ranker) -> tuple[np.ndarray, ...]:
    return spec_of(network, ()).sample({"B": 3, "m": 5})


@pytest.fixture(scope="module")
def given(network: Ranker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> what its command leaves."""
    folder = tmp_path_factory.mktemp("given")
    fastrec.save(network, folder / "checkpoint")
    (folder / "training").mkdir()
    save_model(folder / "training" / "model.safetensors", network)
    (folder / "training" / "checkpoint.safetensors").write_bytes(b"optimiser")
    fastrec.save(network, folder / "search" / "best")
    (folder / "search" / "journal.json").write_text("{}")
    engine = fastrec.compile(network, spec_of(network, ()).sample(), "native", 1)
    engine.save(folder / "small.engine")
    names = ("checkpoint", "training", "search", "small.engine")
    return {name.partition(".engine")[0]: folder / name for name in names}


def run(command: Any, *arguments: str) -> Any:
    """The result of one command; its own errors come through."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "kind", "within"),
    [
        ("checkpoint", "checkpoint", "."),
        ("training", "training", "."),
        ("search", "checkpoint", "best"),
        ("small", "engine", "."),
    ],
)
def test_what_commands_leave_is_found(
    given: dict[str, Path], name: str, kind: str, within: str
) -> None:
    found = find_model(given[name])
    assert (found.kind, found.path) == (kind, given[name] / within)
    assert found.name == (within if within != "." else name)


def test_a_file_inside_a_checkpoint_is_that_checkpoint(given: dict[str, Path]) -> None:
    found = find_model(given["checkpoint"] / "model.safetensors")
    assert (found.kind, found.path) == ("checkpoint", given["checkpoint"])


@pytest.mark.parametrize("name", ["checkpoint", "training", "search"])
def test_all_of_them_give_the_same_model(
    given: dict[str, Path], name: str, network: Ranker, request_of: tuple[np.ndarray, ...]
) -> None:
    model = find_model(given[name]).model()
    tensors = tuple(map(torch.from_numpy, request_of))
    with torch.inference_mode():
        assert torch.equal(model(*tensors), network(*tensors))


def test_several_models_are_named(given: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=r"holds several: .*checkpoint, .*small.engine"):
        find_model(given["small"].parent)


@pytest.mark.parametrize("name", ["nothing", "module:", "text"])
def test_what_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_text("no engine")
    with pytest.raises(ArgumentError, match="expected an engine, a folder of"):
        find_model(tmp_path / name)


def test_an_engine_has_no_torch_model(given: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="the checkpoint that the engine was compiled from"):
        find_model(given["small"]).model()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no_such_module:Own", "No module named"),
        (f"{__file__}:Missing", "has no attribute 'Missing'"),
        (f"{__file__}:NOT_A_MODEL", "gives int"),
        (f"{__file__}:features", "gives Tensor"),
        (f"{__file__}:run", "a callable without arguments"),
        ("no_such_file.py:Own", "no_such_file.py"),
    ],
)
def test_an_own_model_that_is_none_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        find_model(text).model()


def test_an_own_module_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_this_test.py").write_text("class Made:\n    value = 3\n")
    monkeypatch.chdir(tmp_path)
    assert attribute("mine_for_this_test:Made.value") == 3


@pytest.mark.parametrize("name", ["checkpoint", "training", "search"])
def test_compile(
    given: dict[str, Path], name: str, tmp_path: Path, network: Ranker,
    request_of: tuple[np.ndarray, ...],
) -> None:  # fmt: skip
    out = tmp_path / "new" / "out.engine"
    report = tmp_path / "report.json"
    result = run(compile, given[name], out, "--threads", 1, "--json", report)
    assert result.exit_code == 0, result.output
    with load_engine(out) as engine, torch.inference_mode():
        expected = network(*map(torch.from_numpy, request_of)).numpy()
        np.testing.assert_allclose(engine(*request_of), expected, rtol=1e-4, atol=1e-5)
    told = json.loads(report.read_text())
    assert (told["backend"], told["precision"], told["threads"]) == ("native", "fp32", 1)
    assert told["size_mb"] == out.stat().st_size / 1e6


def test_compile_quantises_on_calibration_data(
    given: dict[str, Path], tmp_path: Path, request_of: tuple[np.ndarray, ...]
) -> None:
    np.savez(tmp_path / "batch.npz", *request_of)
    arguments = ("--calibration", tmp_path / "batch.npz")
    run(compile, given["checkpoint"], tmp_path / "int8.engine", *arguments)
    with load_engine(tmp_path / "int8.engine") as engine:
        assert engine.precision == "int8"
    model = find_model(given["checkpoint"]).model()
    fastrec.quantize_(model, fastrec.Int8(), [request_of])
    fastrec.save(model, tmp_path / "int8")
    with pytest.raises(ArgumentError, match="is INT8 already"):
        run(compile, tmp_path / "int8", tmp_path / "twice.engine", *arguments)


def test_compile_of_an_own_model(tmp_path: Path) -> None:
    out = tmp_path / "own.engine"
    with pytest.raises(ArgumentError, match="--example"):
        run(compile, OWN, out)
    run(compile, OWN, out, "--example", f"{__file__}:features")
    np.savez(tmp_path / "x.npz", features().numpy())
    run(compile, OWN, tmp_path / "again.engine", "--example", tmp_path / "x.npz")
    x = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    with load_engine(out) as first, load_engine(tmp_path / "again.engine") as second:
        with torch.inference_mode():
            expected = Own().eval()(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(first(x), expected, rtol=1e-4, atol=1e-6)
        assert np.array_equal(first(x), second(x))


@pytest.mark.parametrize("content", [b"", b"no zip"])
def test_an_example_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"--example: expected a \.npz of arrays"):
        run(compile, OWN, tmp_path / "own.engine", "--example", tmp_path / "x.npz")


def test_a_model_is_compiled_once_for_what_takes_engines(
    given: dict[str, Path], monkeypatch: pytest.MonkeyPatch, request_of: tuple[np.ndarray, ...]
) -> None:
    first = find_model(given["training"]).engine_path()
    assert first.name == "training.engine"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it was compiled again"))
    assert find_model(given["training"]).engine_path() == first
    with load_engine(first) as one, load_engine(given["small"]) as other:
        np.testing.assert_allclose(one(*request_of), other(*request_of), rtol=1e-5, atol=1e-6)
    assert served_path(given["training"]) == first
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="cannot be compiled: ArgumentError: --example"):
        find_model(OWN).engine_path()


def test_a_model_replaced_while_it_is_compiled_is_compiled_again(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(given["training"], folder)
    runs = []

    def compiles(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        runs.append(command)
        if len(runs) == 1:
            (folder / "model.extra").write_text("another")
        shutil.copy(given["small"], command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compiles)
    engine = find_model(folder).engine_path()
    assert len(runs) == 2
    assert list((tmp_path / "cache" / "engines").iterdir()) == [engine.parent]
    assert find_model(folder).engine_path() == engine
    assert len(runs) == 2
    data = bytearray(engine.read_bytes())
    data[-1] ^= 1
    engine.write_bytes(data)
    find_model(folder).engine_path()
    assert len(runs) == 3  # a damaged one counts as missing
    (folder / "model.extra").unlink()
    assert find_model(folder).engine_path().parent != engine.parent
    assert len(runs) == 4


def test_a_cache_that_cannot_be_written_is_no_error(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "file"))

    def compiles(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        shutil.copy(given["small"], command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compiles)
    with load_engine(find_model(given["training"]).engine_path()) as engine:
        assert engine.backend == "native"


def test_what_a_server_takes_as_it_is(given: dict[str, Path]) -> None:
    assert served_path(given["checkpoint"]) == given["checkpoint"]
    assert served_path(given["search"]) == given["search"] / "best"
    assert served_path(given["small"]) == given["small"]
    assert served_path(given["small"].parent) == given["small"].parent
    with pytest.raises(ArgumentError, match="does not exist"):
        served_path("nowhere")


@pytest.mark.parametrize("name", ["training", "small"])
def test_explain_and_bench(given: dict[str, Path], name: str, tmp_path: Path) -> None:
    run(explain, given[name], "--json", tmp_path / "e.json")
    assert any(row.get("us") for row in json.loads((tmp_path / "e.json").read_text()))
    arguments = ("--engines", "native", "--batch", "2", "--seconds-per-engine", "0.05")
    run(bench, given[name], *arguments, "--json", tmp_path / "b.json")
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert row["latency_ms"]["p50"] > 0
    assert (row["engine"], row["batch"]) == ("native", 2)


def test_bench_of_an_own_model(tmp_path: Path) -> None:
    arguments = ("--engines", "native,torch", "--batch", "3", "--seconds-per-engine", "0.05")
    run(bench, OWN, "--example", f"{__file__}:features", *arguments, "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["native", "torch"]
    assert all(row["latency_ms"] for row in rows), rows


def test_export_of_a_training_s_output(given: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="fastrec-kernels[onnx] is not installed")
    result = run(export, given["training"], tmp_path / "m.onnx", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    inputs = json.loads((tmp_path / "e.json").read_text())["inputs"]
    assert inputs["cand_item"] == [2, 50]


def test_loadtest_and_simulate_run_what_was_found(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc", reason="fastrec-kernels[serve] is not installed")
    monkeypatch.setattr(ModelSource, "engine_path", lambda source: given["small"])
    arguments = ("--rate", "20", "--seconds", "0.5", "--slo-ms", "5000")
    run(loadtest, given["search"], *arguments, "--json", tmp_path / "l.json")
    assert json.loads((tmp_path / "l.json").read_text())["target"] == "best, in this process"
    fleet = ("--engines", "500", "--rate", "100", "--seconds", "0.2", "--json", tmp_path / "s.json")
    result = run(simulate, given["search"], *fleet)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "s.json").read_text())["rows"]


def test_calibration_data_that_is_none_is_refused(network: Ranker, tmp_path: Path) -> None:
    with pytest.raises(fastrec.errors.DataError):
        calibration_batches(network, tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(fastrec.errors.FastrecError):
        calibration_batches(network, tmp_path)

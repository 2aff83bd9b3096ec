"""Tables of tuned configurations: kept in the user's cache, never trusted blindly."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastrec import env
from fastrec.errors import ArgumentError, BackendError
from fastrec.kernels import _tuning
from fastrec.kernels.sparse_int8_linear import _cuda as op
from fastrec.kernels.sparse_int8_linear import _gpu
from fastrec.kernels.sparse_int8_linear._config import CUDA_CONFIGS, CudaConfig, cuda_heuristic
from fastrec.kernels.sparse_int8_linear.samples import sample

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="nothing here is Triton's")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path))
    return tmp_path


def table(source: str = "source", gpu: str = "GPU (9.0)") -> _tuning.Table:
    return _tuning.Table("sparse_int8_linear", gpu, source, ("-O3",))


def test_entries_survive_the_process_and_stay_in_the_cache(own_cache: Path) -> None:
    table().keep("8 1 1 0", CUDA_CONFIGS[3])
    table().keep("16 1 1 0", CUDA_CONFIGS[4])
    assert table().find("8 1 1 0", CUDA_CONFIGS) == CUDA_CONFIGS[3]
    assert table().find("16 1 1 0", CUDA_CONFIGS) == CUDA_CONFIGS[4]
    assert [path.parent for path in own_cache.rglob("*.json")] == [own_cache / "tuned"]
    assert not list((own_cache / "tuned").glob("*.json?*")), "a file half written"


def test_another_source_or_gpu_knows_nothing() -> None:
    table().keep("8 1 1 0", CUDA_CONFIGS[3])
    assert table(source="changed").find("8 1 1 0", CUDA_CONFIGS) is None
    assert table(gpu="GPU (8.0)").find("8 1 1 0", CUDA_CONFIGS) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 1}', '{"entries": {"8": 3}}'])
def test_a_broken_file_counts_as_none(text: str) -> None:
    path = table().path
    path.parent.mkdir()
    path.write_text(text)
    assert table().find("8 1 1 0", CUDA_CONFIGS) is None


def test_an_entry_that_no_kernel_has_is_passed_over() -> None:
    table().keep("8 1 1 0", CUDA_CONFIGS[0])
    content = json.loads(table().path.read_text())
    content["entries"]["8 1 1 0"]["rows"] = 4096
    table().path.write_text(json.dumps(content))
    assert table().find("8 1 1 0", CUDA_CONFIGS) is None


def test_calls_take_the_tuned_configuration_and_else_the_heuristics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (x, packed), kwargs = sample(9, 96, 36, bias=False).make()
    prepared = _gpu.prepare(packed, **kwargs | {"out_scale": None, "out_zero_point": None})
    weight = prepared.weight
    monkeypatch.setattr(_tuning, "gpu_name", lambda index: "GPU (9.0)")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(op, "run", lambda prepared, x, y, config: None)
    op.table.cache_clear()
    op.choose.cache_clear()

    def chosen(rows: int) -> CudaConfig:
        return op.chosen(weight, rows, 0)

    heuristic = cuda_heuristic(9, weight.panels, weight.paired)
    assert chosen(9) == heuristic
    slow = next(config for config in CUDA_CONFIGS if config != heuristic)
    monkeypatch.setattr(_tuning, "fastest", lambda configs, time_ms: slow)
    assert op.tune(prepared, x, torch.empty(9, 96)) == slow
    assert chosen(9) == slow
    assert chosen(16) == slow  # the same power of two
    assert chosen(17) == cuda_heuristic(17, weight.panels, weight.paired)
    op.table.cache_clear()
    op.choose.cache_clear()


def test_the_fastest_is_the_one_that_took_least() -> None:
    assert _tuning.fastest([3, 1, 2], float) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would be tuned")
def test_the_command_without_a_gpu_says_why() -> None:
    from typer.testing import CliRunner

    from fastrec import cli

    cli._mount()
    result = CliRunner().invoke(cli.app, ["tune"])
    assert isinstance(result.exception, BackendError)
    assert str(result.exception).startswith("fastrec tune: torch sees no CUDA device")


def test_the_command_keeps_every_shape_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrec.kernels import _cuda
    from fastrec.kernels.sparse_int8_linear import _tune
    from fastrec.runtime.cuda import cli

    kept = table()
    monkeypatch.setattr(_cuda, "cuda_can_run", lambda signature: None)
    monkeypatch.setattr(_tune, "table", lambda: kept)
    monkeypatch.setattr(_tune, "tune", lambda shape: kept.keep(str(shape), CUDA_CONFIGS[2]) or "")
    with pytest.raises(ArgumentError, match=r"batches.*numbers of 1 or more"):
        cli.tune(None, batches="1,no")
    cli.tune(None, batches="1", json_out=tmp_path / "tuned.json")
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert list(written) == [kept.path.name]
    content = written[kept.path.name]
    assert content == json.loads(kept.path.read_text())
    assert len(content["entries"]) == len(_tune.shapes()) == len({*map(str, _tune.shapes())})


def test_a_shipped_table_is_read_and_the_machines_own_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = table()
    kept.keep("8", CUDA_CONFIGS[1])
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(_tuning, "SHIPPED", shipped)
    content = kept.content()
    content["entries"] = {name: asdict(CUDA_CONFIGS[2]) for name in ("8", "16")}
    (shipped / kept.path.name).write_text(json.dumps(content))
    assert table().find("8", CUDA_CONFIGS) == CUDA_CONFIGS[1]
    assert table().find("16", CUDA_CONFIGS) == CUDA_CONFIGS[2]

"""``backend="auto"``: measured once, remembered for what it holds for, never wrong, explained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastrec
from fastrec.errors import ArgumentError, BackendError
from fastrec.measure import machine
from fastrec.measure.choice import contest
from fastrec.runtime import choice_cache, compiler
from fastrec.runtime.backends import BACKENDS, backend_module
from fastrec.runtime.choice_cache import model_hash
from fastrec.runtime.engine import Engine

X = (torch.linspace(-1, 1, 12).reshape(3, 4),)


class Scores(Engine):
    """Answers of a backend of this test: the model's, or wrong ones."""

    model: Any
    wrong = 0.0

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            scores: np.ndarray = self.model(torch.from_numpy(arrays[0])).numpy()
        return scores + self.wrong


@pytest.fixture
def backends(monkeypatch, tmp_path):
    """Three backends that build at once; name -> how often each was built, and what it adds."""
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path))
    built: dict[str, int] = {}
    wrong: dict[str, float] = {}
    for name in BACKENDS:
        module: Any = backend_module(name)
        if name not in ("native", "torch", "onnxruntime"):
            monkeypatch.setattr(module, "can_run", lambda: "not in this test")
            continue

        def build(model: Any, examples: Any, options: Any, name: str = name) -> Engine:
            built[name] = built.get(name, 0) + 1
            engine = Scores(
                backend=name,
                precision="fp32",
                threads=1,
                spec=options.spec,
                rows=[],
                versions={},
            )
            engine.model, engine.wrong = copy.deepcopy(model).eval(), wrong.get(name, 0.0)
            return engine

        monkeypatch.setattr(module, "build", build)
        monkeypatch.setattr(module, "can_run", lambda: None)
        monkeypatch.setattr(module, "versions", lambda: {"a": "1"})
    monkeypatch.setattr(
        compiler, "contest", lambda engines, inputs: (list(engines)[-1], _samples(engines))
    )
    return built, wrong


def _samples(engines: Any) -> dict[str, Any]:
    from fastrec.measure.timing import Samples

    return {name: Samples(np.full((2, 2), 1_000_000)) for name in engines}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def auto(model: nn.Module, inputs: Any = X, **options: Any) -> Engine:
    return fastrec.compile(model, inputs, threads=1, **options)


def test_measured_once_and_remembered(backends, model):
    built, _ = backends
    first = auto(model)
    assert set(built) == {"native", "onnxruntime", "torch"}
    second = auto(model)
    assert second.backend == first.backend == "torch"
    assert built == {"native": 1, "onnxruntime": 1, "torch": 2}
    rows = second.describe()
    assert rows[0]["setting"] == "auto"
    assert "on this machine, for this model" in rows[0]["why"]
    # What was measured then is still said.
    assert rows[1 : 1 + len(first.describe())] == first.describe()
    assert any(row["why"].endswith("not in this test") for row in rows)


def test_measure_again(backends, model):
    built, _ = backends
    auto(model)
    auto(model, settings={"measure": "again"})
    assert built["native"] == 2
    with pytest.raises(ArgumentError, match="measure"):
        auto(model, settings={"measure": "never"})


def test_what_the_choice_depends_on(backends, model, monkeypatch):
    built, _ = backends
    auto(model)

    def measured_anew(*args: Any, **options: Any) -> bool:
        before = built["native"]
        auto(*args, **options)
        return built["native"] > before

    assert not measured_anew(copy.deepcopy(model))
    assert measured_anew(model, (torch.cat((*X, *X)),))
    assert measured_anew(model, precision="fp32")
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight[0, 0] += 1
    assert measured_anew(trained)
    assert measured_anew(nn.Sequential(model[0], nn.Sigmoid(), model[2]).eval())
    own = machine.cpu_identity()
    with monkeypatch.context() as patched:
        patched.setattr(choice_cache, "cpu_identity", lambda: [*own, "another machine"])
        assert measured_anew(model)
    with monkeypatch.context() as patched:
        patched.setattr(backend_module("native"), "versions", lambda: {"a": "2"})
        assert measured_anew(model)
    with monkeypatch.context() as patched:
        patched.setattr(backend_module("openvino"), "can_run", lambda: "broken")
        assert measured_anew(model)
    assert not measured_anew(model)


def test_code_of_own_modules_counts():
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    first = Half

    class Half(nn.Module):  # type: ignore[no-redef]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 3

    assert model_hash(first()) != model_hash(Half())
    assert model_hash(Half()) == model_hash(Half())
    for dtype in (torch.bfloat16, torch.int8, torch.bool):
        module = nn.Module()
        module.register_buffer("held", torch.zeros(3, dtype=dtype))
        module.register_buffer("scalar", torch.zeros((), dtype=dtype))
        module.register_buffer("empty", torch.zeros(0, 2, dtype=dtype))
        before = model_hash(module)
        module.held[1] = 1
        assert model_hash(module) != before


def damaged(content: bytes) -> list[bytes]:
    return [b"", content[:-1], content[:20], b"{}", content.replace(b"torch", b"tarch")]


@pytest.mark.parametrize("how", range(5))
def test_a_damaged_choice_is_made_anew(backends, model, tmp_path, how):
    built, _ = backends
    auto(model)
    (file,) = (tmp_path / "auto").iterdir()
    file.write_bytes(damaged(file.read_bytes())[how])
    auto(model)
    assert built["native"] == 2
    auto(model)
    assert built["native"] == 2


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"backend": "abacus"}', '{"holds for": null, "backend": "native", "rows": []}'],
)
def test_a_foreign_choice_is_not_used(backends, model, tmp_path, content):
    from fastrec.runtime.cache import write_checked

    built, _ = backends
    auto(model)
    (file,) = (tmp_path / "auto").iterdir()
    assert write_checked(file, content.encode())
    auto(model)
    assert built["native"] == 2


def test_a_remembered_backend_that_answers_wrongly_now_is_dropped(backends, model):
    built, wrong = backends
    auto(model)
    wrong["torch"] = 0.5
    engine = auto(model)
    assert engine.backend == "onnxruntime"
    assert built["native"] == 2
    why = {row["setting"]: row["why"] for row in engine.describe()}
    assert "disagrees with torch" in why["torch, remembered"]
    assert "disagrees with torch" in why["torch"]
    assert auto(model).backend == "onnxruntime"
    assert built["native"] == 2


def test_no_backend_that_is_right(backends, model):
    _, wrong = backends
    wrong.update(dict.fromkeys(("native", "onnxruntime", "torch"), 0.5))
    with pytest.raises(BackendError, match=r"no backend can run this model: .*disagrees"):
        auto(model)


def test_no_cache_folder_is_no_error(backends, model, monkeypatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "file"))
    assert auto(model).backend == "torch"


def test_the_contest_tells_apart_what_lies_close(monkeypatch):
    """Engines on a clock of the test's own: the slower one has the one lucky round."""
    import fastrec.measure.choice as module
    from fastrec.measure.timing import interleaved

    now, calls = [0], {"steady": 0, "lucky": 0, "slow": 0}

    def engine(name: str, ms: float) -> Any:
        def call(*_: Any) -> None:
            calls[name] += 1
            lucky = name == "lucky" and 60 < calls[name] < 66
            now[0] += int(1e6 * (ms * 0.5 if lucky else ms))

        return call

    monkeypatch.setattr(
        module,
        "interleaved",
        lambda *a, **k: interleaved(*a, **k, clock=lambda: now[0], sleep=lambda s: None),
    )
    engines = {"lucky": engine("lucky", 1.05), "steady": engine("steady", 1.0)}
    best, taken = contest(engines | {"slow": engine("slow", 2.0)}, (), seconds=1000)
    assert best == "steady"
    assert taken["lucky"].best_round_ms < taken["steady"].best_round_ms
    assert taken["slow"].ns.shape[0] == 8
    assert taken["steady"].ns.shape[0] == 40

"""autotune: under a budget, the choice of choices that costs least quality; measured, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fastrec
from fastrec import Budget, autotune
from fastrec.errors import ArgumentError, ArtifactError, BackendError, BudgetError, DtypeError
from fastrec.kernels._compiled import reason_missing
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.search import AutotuneResult, Space

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
SPACE = Space(sparsities=(0.0, 0.75), ranks=(0.25,), groups=())


class Model(nn.Module):
    """A table and a tower whose first layer hardly matters: ``quiet`` is scaled down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(1000, 64)
        self.quiet = nn.Linear(64, 256)
        self.loud = nn.Linear(64, 256)
        self.score = nn.Linear(256, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.items(ids)
        return self.score(torch.relu(self.loud(x) + 1e-3 * self.quiet(x))).squeeze(-1)


BATCHES = [(torch.randint(0, 1000, (16, 20), generator=torch.Generator().manual_seed(i)),)
           for i in range(3)]  # fmt: skip


class Quality:
    """Negative squared distance from the untouched model's scores; counts its calls."""

    def __init__(self, model: nn.Module | None = None) -> None:
        with torch.no_grad():
            self.target = [(model or Model()).eval()(*b) for b in BATCHES]
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        assert not model.training
        assert not torch.is_grad_enabled()
        pairs = zip(BATCHES, self.target, strict=True)
        return -float(sum((model(*b) - t).square().mean() for b, t in pairs))


def tuned(budget: Budget, **options: Any) -> AutotuneResult:
    arguments = {"evaluate": Quality(), "calibration": BATCHES, "space": SPACE, "trials": 4}
    return autotune(Model(), budget, **(arguments | options))


def half_size(**options: Any) -> AutotuneResult:
    return tuned(Budget(size_mb=0.16, batch=2, threads=1), **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutotuneResult, Path]:
    out = tmp_path_factory.mktemp("tuned")
    return half_size(out=out), out


def test_the_best_within_the_budget_is_measured_and_served(
    found: tuple[AutotuneResult, Path], tmp_path: Path
) -> None:
    result, _ = found
    chosen = result.chosen
    assert chosen.within
    assert chosen.size_mb <= 0.16
    assert chosen.quality == max(p.quality for p in result.points if p.within)
    # What is returned is what was measured: quality, size and an engine that agrees.
    with torch.no_grad():
        assert Quality()(result.best) == pytest.approx(chosen.quality, abs=1e-6)
    saved = result.save(tmp_path / "best")
    assert fastrec.compress.artifact_bytes(saved) / 1e6 == pytest.approx(chosen.size_mb, rel=0.05)
    again = fastrec.load(saved, Model())
    torch.testing.assert_close(again(*BATCHES[0]), result.best(*BATCHES[0]))
    engine = fastrec.compile(result.best, BATCHES[0], backend="native", threads=1)
    assert engine(*BATCHES[0]).shape == (16, 20)
    # Predictions are of the right size; bytes hardly differ.
    for point in result.points:
        assert point.predicted_mb == pytest.approx(point.size_mb, rel=0.05)
        assert point.predicted_ms > 0 < point.latency_ms
    assert isinstance(result.best.items, Int8Embedding)
    assert result.left == {"score": "fewer than 16 outputs"}


def test_what_hardly_matters_is_given_up_first(found: tuple[AutotuneResult, Path]) -> None:
    result, _ = found
    losses = result.losses
    pruned = "int8, 75 % pruned"
    assert losses["loud"][pruned] > 100 * losses["quiet"][pruned]
    assert losses["loud"]["fp32"] == losses["quiet"]["fp32"] == 0
    costs = result.costs
    assert costs["loud"]["int8"]["bytes"] < 0.4 * costs["loud"]["fp32"]["bytes"]
    assert costs["loud"][pruned]["bytes"] < 0.5 * costs["loud"]["int8"]["bytes"]
    # A float layer that is pruned is smaller, and as slow.
    assert costs["loud"]["fp32, 75 % pruned"]["us"] == costs["loud"]["fp32"]["us"]


def test_the_front_is_not_beaten_and_shown(
    found: tuple[AutotuneResult, Path], tmp_path: Path
) -> None:
    result, _ = found
    front = result.front
    assert front
    assert [p.size_mb for p in front] == sorted(p.size_mb for p in front)
    assert [p.quality for p in front] == sorted(p.quality for p in front)
    console = Console(record=True, width=200)
    console.print(result.table())
    assert "best" in console.export_text()
    result.save_json(tmp_path / "tuned.json")
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert written["chosen"]["key"] == result.chosen.key
    assert written["cost_model"]["layers"]["paper"]["coefficients"]["alpha"] > 0
    pytest.importorskip("matplotlib", reason="plots need the report extra")
    assert result.plot(tmp_path / "tuned.png").startswith(b"\x89PNG")


def test_a_second_call_goes_on_from_the_journal(found: tuple[AutotuneResult, Path]) -> None:
    result, out = found
    quality = Quality()
    again = half_size(out=out, evaluate=quality)
    assert quality.calls == 0
    assert again.reused > 0
    assert again.chosen.key == result.chosen.key
    torch.testing.assert_close(again.best(*BATCHES[0]), result.best(*BATCHES[0]))
    # Another limit: costs and losses are known, only new trials are evaluated.
    wider = tuned(Budget(size_mb=0.2, batch=2, threads=1), out=out, evaluate=quality)
    assert 0 <= quality.calls <= 4
    assert wider.chosen.quality >= result.chosen.quality
    # Another model: set aside.
    other = Model()
    with torch.no_grad():
        other.score.bias.add_(1)
    with pytest.raises(BudgetError):
        autotune(other, Budget(size_mb=0.001, batch=2, threads=1), evaluate=quality,
                 calibration=BATCHES, space=SPACE, out=out)  # fmt: skip
    assert (out / "journal.json.old").exists()
    (out / "journal.json").write_text("{")
    with pytest.raises(ArtifactError, match="journal"):
        half_size(out=out)


def test_fine_tuning_keeps_zeros_and_halves_the_trials() -> None:
    rounds: list[int] = []

    def finetune(model: nn.Module, round_: int) -> None:
        rounds.append(round_)
        zeros = [w == 0 for w in (model.quiet.weight, model.loud.weight) if w.dim() == 2
                 ] if isinstance(model.loud, nn.Linear) and isinstance(model.quiet, nn.Linear
                 ) else []  # fmt: skip
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        model(*BATCHES[0]).square().mean().backward()
        for parameter, zero in zip((model.quiet, model.loud), zeros, strict=False):
            if float(zero.float().mean()) > 0.5:
                assert bool((parameter.weight.grad[zero] == 0).all())
        optimizer.step()

    model = Model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = autotune(model, Budget(size_mb=0.16, threads=1), evaluate=Quality(),
                      calibration=BATCHES, space=SPACE, trials=4, rounds=3,
                      finetune=finetune)  # fmt: skip
    assert rounds == sorted(rounds)
    counts = [rounds.count(r) for r in (1, 2, 3)]
    assert counts[0] == len(result.points) - 1
    assert counts[1] == max(1, counts[0] // 2)
    assert counts[2] == 1
    # The caller's model is as it was.
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for layer in (result.best.quiet, result.best.loud):
        if isinstance(layer, SparseInt8Linear) and "75" in result.chosen.chosen["loud"]:
            assert layer.density <= 1.0


def test_what_cannot_be_reached_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match="nearest") as caught:
        tuned(Budget(size_mb=0.01, threads=1), space=Space(sparsities=(), ranks=(), groups=(2,)))
    assert 0.05 < caught.value.nearest["size_mb"] < 0.4
    with pytest.raises(BudgetError, match="ms") as slow:
        tuned(Budget(latency_ms=1e-6, threads=1), space=Space(sparsities=(), ranks=(), groups=(2,)))
    assert slow.value.nearest["latency_ms"] > 1e-6


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({}, "neither"),
        ({"latency_ms": 0}, "latency_ms"),
        ({"latency_ms": float("nan")}, "latency_ms"),
        ({"latency_ms": float("inf")}, "latency_ms"),
        ({"size_mb": -1}, "size_mb"),
        ({"size_mb": True}, "size_mb"),
        ({"size_mb": "4"}, "size_mb"),
        ({"size_mb": 1, "batch": 0}, "batch"),
        ({"size_mb": 1, "batch": None}, "batch"),
        ({"size_mb": 1, "threads": 1.5}, "threads"),
    ],
)
def test_budgets_that_say_nothing_are_refused(limits: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Budget(**limits)


def test_bad_arguments_are_refused() -> None:
    budget = Budget(size_mb=1, threads=1)
    for options, error, match in (
        ({"evaluate": 3}, DtypeError, "evaluate"),
        ({"finetune": 3}, DtypeError, "finetune"),
        ({"space": {}}, DtypeError, "space"),
        ({"calibration": []}, ArgumentError, "calibration"),
        ({"trials": 0}, ArgumentError, "trials"),
        ({"rounds": 0}, ArgumentError, "rounds"),
        ({"evaluate": lambda model: float("nan")}, ArgumentError, "finite quality"),
        ({"calibration": [{"ids": BATCHES[0][0]}]}, ArgumentError, "inputs"),
    ):
        with pytest.raises(error, match=match):
            tuned(budget, **options)
    with pytest.raises(DtypeError, match="budget"):
        tuned(1.0)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="model"):
        autotune(3, budget, evaluate=Quality(), calibration=BATCHES)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="layers that have a choice"):
        autotune(nn.Sequential(nn.ReLU()), budget, evaluate=Quality(), calibration=BATCHES)


def test_a_model_without_a_plan_names_what_is_lacking() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).cumprod(-1)

    x = torch.randn(4, 64)
    with pytest.raises(BackendError, match="cumprod"):
        autotune(Products(), Budget(size_mb=1, threads=1), evaluate=lambda m: 0.0,
                 calibration=[(x,)])  # fmt: skip

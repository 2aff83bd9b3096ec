"""``fastrec.accelerate``: one call from a torch model to an engine and a table."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastrec
from fastrec.errors import ArgumentError, DtypeError
from fastrec.exporters.model_spec import quantised_module
from fastrec.runtime import load_engine
from fastrec.search import Accelerated
from fastrec.search.answers import Answers

ROWS, DIM = 2000, 32


class Scorer(nn.Module):
    """Candidates scored against the mean of a history."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, DIM)
        self.tower = nn.Sequential(nn.Linear(2 * DIM, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def forward(self, history: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        user = self.items(history).mean(1, keepdim=True).expand(-1, candidates.shape[1], -1)
        pairs = torch.cat([user, self.items(candidates)], -1)
        return self.head(self.tower(pairs)).squeeze(-1)


class Spiked(Scorer):
    """An input of a layer is thousands of times the others, and its weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(33, 16), nn.Linear(16, 1))
        with torch.no_grad():
            self.head[0].weight[:, -1] = 0

    def forward(self, history: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        user = self.items(history).mean(1, keepdim=True).expand(-1, candidates.shape[1], -1)
        hidden = self.tower(torch.cat([user, self.items(candidates)], -1))
        spike = torch.full_like(hidden[..., :1], 1e4)
        return self.head(torch.cat([hidden, spike], -1)).squeeze(-1)


def requests(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    history = torch.randint(0, ROWS, (rows, 10), generator=draw)
    return history, torch.randint(0, ROWS, (rows, 50), generator=draw)


def made(kind: type[Scorer], **options: Any) -> tuple[Scorer, Accelerated]:
    torch.manual_seed(0)
    model = kind().eval()
    batches = [requests(16, seed) for seed in range(8)]
    settings = {"calibration": batches, "rivals": (), "seconds": 0.2, "show": False} | options
    return model, fastrec.accelerate(model, requests(4, 99), **settings)


def ways(result: Accelerated) -> dict[str, Any]:
    return {way.name: way for way in result.ways}


def test_the_answers_are_kept_and_the_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    before = copy.deepcopy(Scorer().state_dict())
    model, result = made(Scorer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.items) is nn.Embedding
    found = ways(result)
    assert list(found) == ["torch", "fastrec", "fastrec INT8"]
    assert found["torch"].kept == 1
    assert found["fastrec"].kept == pytest.approx(1, abs=1e-5)
    assert 0.99 <= found["fastrec INT8"].kept <= 1
    assert found["fastrec INT8"].weights_mb < 0.5 * found["torch"].weights_mb
    assert [way.name for way in result.ways if way.chosen] == [chosen(result)]
    inputs = requests(7, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            result.engine(*inputs), result.model(*inputs), rtol=2e-2, atol=2e-2
        )
    result.engine.close()


def chosen(result: Accelerated) -> str:
    int8 = quantised_module(result.model) is not None
    assert int8 == (result.report is not None) == (result.engine.precision == "int8")
    if int8:
        return "fastrec INT8"
    return "fastrec" if result.engine.backend == "native" else "torch"


def test_an_evaluation_decides_what_int8_may_lose() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        seen.append(quantised_module(model) is not None)
        return 0.5 if seen[-1] else 1.0

    _, result = made(Scorer, evaluate=evaluate, keep=0.9)
    result.engine.close()
    assert seen[0] is False
    assert True in seen
    int8 = ways(result)["fastrec INT8"]
    assert int8.p50_ms is None
    assert int8.why.startswith("quality 0.5 after 1")
    assert ways(result)["torch"].quality == 1.0
    assert result.report is None


def test_a_layer_that_loses_the_answers_stays_float() -> None:
    _, result = made(Spiked)
    result.engine.close()
    int8 = ways(result)["fastrec INT8"]
    assert int8.why == "float to keep the answers: head.0"
    assert int8.kept >= 0.99


def test_named_inputs_and_examples_as_calibration() -> None:
    torch.manual_seed(0)
    history, candidates = requests(16, 0)
    result = fastrec.accelerate(
        Scorer().eval(), {"history": history, "candidates": candidates},
        rivals=(), seconds=0.1, show=False,
    )  # fmt: skip
    scores = result.engine(history=history, candidates=candidates)
    assert scores.shape == (16, 50)
    result.engine.close()


def test_a_rival_that_cannot_be_built_stands_in_the_table_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, result = made(Scorer, rivals=("cuda",), show=True)
    result.engine.close()
    row = ways(result)["cuda"]
    assert row.p50_ms is None
    assert row.why
    printed = capsys.readouterr().out
    assert "fastrec INT8" in printed
    assert "taken" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep: expected a share"),
        ({"keep": 1.5}, "keep: expected a share"),
        ({"calibration": []}, "calibration: expected at least one batch"),
        ({"evaluate": lambda model: float("nan")}, "evaluate: expected a finite quality"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        made(Scorer, **options)


def test_an_evaluate_that_is_no_function() -> None:
    with pytest.raises(DtypeError, match="evaluate: expected a callable"):
        made(Scorer, evaluate=0.5)


class Table(nn.Module):
    """Gives the scores it holds."""

    def __init__(self, scores: np.ndarray) -> None:
        super().__init__()
        self.scores = torch.from_numpy(scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores


def test_kept_is_the_share_of_the_best_answers_lead() -> None:
    scores = np.arange(50.0)[None]
    answers = Answers(Table(scores), [(torch.zeros(1),)], None, 0.99)
    assert answers.kept_by(Table(scores * 3 - 7)) == 1
    assert answers.kept_by(Table(-scores)) == pytest.approx(-1)
    swapped = scores.copy()
    swapped[0, [40, 39]] = 39.0, 40.0  # the tenth best for the eleventh: 0.1 of a lead of 20
    assert answers.kept_by(Table(swapped)) == pytest.approx(1 - 0.1 / 20)
    # A score for each row: the rows are one list, over all batches.
    rows = Answers(Table(scores.reshape(50, 1)), [(torch.zeros(1),)] * 2, None, 0.99)
    assert rows.kept_by(Table(scores.reshape(50) * 2)) == 1
    # All alike: nothing to lose.
    flat = Answers(Table(np.zeros((2, 5))), [(torch.zeros(1),)], None, 0.99)
    assert flat.kept_by(Table(np.ones((2, 5)))) == 1


def test_a_model_without_float_scores() -> None:
    with pytest.raises(DtypeError, match="float scores"):
        Answers(Table(np.arange(5)), [(torch.zeros(1),)], None, 0.99)


def test_the_command_prints_the_table_and_saves_the_engine(tmp_path: Path) -> None:
    out, report = tmp_path / "bst.engine", tmp_path / "report.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "fastrec", "accelerate", "examples/plain_bst.py:PlainBst",
            str(out), "--example", "examples/plain_bst.py:example_inputs", "--rivals", "",
            "--seconds", "0.2",
            "--keep", "0.5", "--threads", "1", "--json", str(report),
        ],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fastrec INT8" in done.stdout
    ways = json.loads(report.read_text())["ways"]
    assert [way["name"] for way in ways] == ["torch", "fastrec", "fastrec INT8"]
    assert sum(way["chosen"] for way in ways) == 1
    with load_engine(out) as engine:
        assert engine.threads == 1

"""``fastrec autotune`` on the real data room: search, go on, refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import fastrec
from fastrec.errors import ArgumentError, DataError
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig

pytest.importorskip("polars", reason="prepared data need the data extra")
pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
SPACE = {"sparsities": [0.0], "ranks": [], "groups": [2], "windows": [2], "offsets": ["none"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder of 60 users, a saved ranker and a space."""
    from fastrec.data import SequenceDataset, prepare

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("log")
    rows = [
        f"{user},{item},{item % 7 + 1},pv,{1511600000 + 60 * step}"
        for user in range(1, 61)
        for step, item in enumerate(rng.integers(1, 80, 9))
    ]
    (root / "log.csv").write_text("\n".join(rows) + "\n")
    prepare(root / "log.csv", root / "data", max_history=8)
    dataset = SequenceDataset.open(root / "data")
    torch.manual_seed(0)
    config = RankerConfig(dataset.n_items, dataset.n_categories, history_length=8, d=32, ffn=64,
                          n_blocks=1, tower=(64,))  # fmt: skip
    fastrec.save(Ranker(config), root / "model")
    (root / "space.json").write_text(json.dumps(SPACE))
    return root


def run(folder: Path, out: Path, *options: object, model: str = "model") -> str:
    from fastrec.search.cli import autotune

    app = typer.Typer()
    app.command()(autotune)
    arguments = [folder / model, folder / "data", out, "--space", folder / "space.json"]
    arguments += ["--threads", 1, "--users", 40, "--trials", 2, "--rounds", 2, *options]
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_search_and_go_on(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--size-mb", 0.08, "--finetune-steps", 2, "--json", report)
    options += ("--markdown", tmp_path / "report.md")
    shown = run(folder, tmp_path / "out", *options)
    assert "best" in shown
    first = json.loads(report.read_text())
    assert first["chosen"]["size_mb"] <= 0.08
    assert first["test"]["users"] == 60
    assert first["machine"]["cpu"]
    page = (tmp_path / "report.md").read_text()
    assert "**chosen**" in page
    assert "## The cost model" in page
    best = fastrec.load(tmp_path / "out" / "best")
    assert sum(1 for _ in best.parameters()) < sum(1 for _ in Ranker(best.config).parameters())
    run(folder, tmp_path / "out", *options)
    again = json.loads(report.read_text())
    assert again["points"] == first["points"]


def test_sasrec(folder: Path, tmp_path: Path) -> None:
    config = SASRecConfig(n_items=80, max_length=6, d=32, ffn=64, n_blocks=1)
    fastrec.save(SASRec(config), folder / "sasrec")
    run(folder, tmp_path / "out", "--latency-ms", 100, "--finetune-steps", 0, model="sasrec")
    assert isinstance(fastrec.load(tmp_path / "out" / "best"), SASRec)


def test_bad_options_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="neither"):
        run(folder, tmp_path / "out")
    with pytest.raises(ArgumentError, match="metric"):
        run(folder, tmp_path / "out", "--size-mb", 1, "--metric", "ndcg_3")
    with pytest.raises(ArgumentError, match="plot"):
        run(folder, tmp_path / "out", "--size-mb", 1, "--plot", tmp_path / "front.svg")
    for text, error in (("{", DataError), ('{"speed": 1}', ArgumentError)):
        (tmp_path / "space.json").write_text(text)
        with pytest.raises(error, match="space"):
            run(folder, tmp_path / "out", "--size-mb", 1, "--space", tmp_path / "space.json")

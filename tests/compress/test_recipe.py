"""Recipe: all five variants from one baseline, resumed where finished, and the command."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastrec.compress import (
    BlockPruning,
    Distillation,
    FineTune,
    HiddenStates,
    Int8,
    LowRank,
    NMPruning,
    Recipe,
    WindowSparse,
    artifact_bytes,
    load,
    read_manifest,
    save,
)
from fastrec.compress.recipe import VARIANTS
from fastrec.compress.student_init import make_student
from fastrec.data import SequenceBatch
from fastrec.errors import ArgumentError
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import Int8Embedding, LowRankLinear, SparseInt8Linear, WindowSparseAttention

CONFIG = RankerConfig(
    n_items=1200, n_categories=20, history_length=8, d=32, ffn=64, tower=(128, 64), n_blocks=1
)
RECIPE = Recipe(
    qat=FineTune(steps=3, lr=1e-4),
    finetune=FineTune(steps=3),
    distill=Distillation(steps=4, share=0.6),
    batch_size=16,
    n_candidates=5,
    calibration_examples=32,
)


class Data:
    """Users who stay in one category: small, in memory, the data set's methods that training
    needs."""

    n_users, n_items, history_length = 64, 1200, 8

    def __init__(self) -> None:
        self.item_count = 2000 // np.arange(1, 1201)
        self.calls = 0

    def num_examples(self, split: str) -> int:
        return self.n_users

    def batches(
        self, split: str, *, batch_size: int, seed: int, limit: int | None = None, **options: Any
    ) -> Iterator[SequenceBatch]:
        self.calls += 1
        rng = np.random.default_rng(seed)
        m = options["n_candidates"]
        for _ in range((limit or self.n_users) // batch_size):
            category = rng.integers(1, 20, (batch_size, 1))
            item = category * 60 + rng.integers(0, 20, (batch_size, 8))
            cand = rng.integers(1, 1200, (batch_size, m))
            label = rng.integers(0, m, batch_size)
            cand[np.arange(batch_size), label] = category[:, 0] * 60
            yield SequenceBatch(
                item=item % 1200,
                category=np.broadcast_to(category, item.shape).copy(),
                behaviour=np.ones_like(item),
                length=np.full(batch_size, 8),
                cand_item=cand % 1200,
                cand_category=cand // 60 % 20,
                label=label,
                user=np.arange(batch_size),
            )


def baseline() -> Ranker:
    torch.manual_seed(0)
    return Ranker(CONFIG)


def inputs() -> list[torch.Tensor]:
    batch = next(Data().batches("test", batch_size=16, seed=5, n_candidates=9))
    return [torch.as_tensor(array) for array in batch.inputs()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], Path]:
    out = tmp_path_factory.mktemp("variants")
    return RECIPE.run(baseline(), Data(), out=out), out


def test_five_variants_each_as_the_table_means_it(made: tuple[dict[str, nn.Module], Path]) -> None:
    models, out = made
    assert tuple(models) == VARIANTS
    assert all(not model.training for model in models.values())
    original = baseline().state_dict()
    assert all(torch.equal(v, original[k]) for k, v in models["baseline"].state_dict().items())
    for name in ("quantized", "pruned_quantized"):
        assert isinstance(models[name].tower[0], SparseInt8Linear)
        assert models[name].tower[0].activation == "relu"
        assert models[name].tower[0](torch.zeros(1, 96)).dtype == torch.uint8
        assert isinstance(models[name].item_embedding, Int8Embedding)
        assert isinstance(models[name].tower[4], nn.Linear)
    assert models["quantized"].tower[0].density == 1.0
    pruned = models["pruned"]
    layers = read_manifest(out / "pruned")["info"]["prune"]["layers"]
    linear = [name for name, row in layers.items() if row["kind"] == "linear"]
    weights = [pruned.get_parameter(name) for name in linear]
    zeros = sum(int((w == 0).sum()) for w in weights)
    total = sum(w.numel() for w in weights)
    assert 0.4 * total - 128 < zeros <= 0.4 * total
    assert (pruned.item_embedding.weight == 0).float().mean() == pytest.approx(0.4, abs=1e-3)
    for name, weight in zip(linear, weights, strict=True):
        layer = models["pruned_quantized"].get_submodule(name.removesuffix(".weight"))
        assert bool((layer.dequantized_weight()[weight == 0] == 0).all())
    student = models["distilled"]
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in student.parameters()) <= 0.6 * CONFIG.n_parameters()
    for model in models.values():
        scores = model(*inputs())
        assert scores.shape == (16, 9)
        assert scores.isfinite().all()
    sizes = {name: artifact_bytes(out / name) for name in VARIANTS}
    assert sizes["pruned_quantized"] < sizes["quantized"] < sizes["pruned"] < sizes["baseline"]


def test_finished_variants_are_loaded_and_others_made_anew(
    made: tuple[dict[str, nn.Module], Path], tmp_path: Path
) -> None:
    models, out = made
    data, stages = Data(), []
    again = RECIPE.run(baseline(), data, out=out, progress=lambda s, d, t: stages.append(s))
    assert data.calls == 0
    assert stages == list(VARIANTS)
    for name, model in again.items():
        assert torch.equal(model(*inputs()), models[name](*inputs()))
    other = dataclasses.replace(RECIPE, seed=1)
    assert read_manifest(out / "pruned")["recipe"] == RECIPE.to_dict()
    part = other.run(baseline(), data, out=out, variants=("quantized",))
    assert data.calls > 0
    assert list(part) == ["quantized"]
    assert read_manifest(out / "quantized")["recipe"]["seed"] == 1
    (out / "distilled" / "model.safetensors").write_bytes(b"torn")
    assert RECIPE.run(baseline(), Data(), out=out, variants=("distilled",))["distilled"]
    load(out / "distilled")


def test_same_seed_same_variants_and_the_baseline_is_untouched() -> None:
    model = baseline()
    model.train()
    before = copy.deepcopy(model.state_dict())
    first = RECIPE.run(model, Data(), variants=("pruned_quantized",))
    second = RECIPE.run(model, Data(), variants=("pruned_quantized",))
    a, b = first["pruned_quantized"].state_dict(), second["pruned_quantized"].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_calibration_only_and_other_models() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.items = nn.Embedding(1200, 32)
            self.mix = nn.Linear(32, 64)

        def forward(self, item: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            user = self.mix(self.items(item)).mean(1, keepdim=True)
            return (user * self.mix(self.items(rest[3]))).sum(-1)

    recipe = dataclasses.replace(RECIPE, qat=None)
    made = recipe.run(Own(), Data(), variants=("baseline", "quantized", "pruned"))
    assert isinstance(made["quantized"].mix, SparseInt8Linear)
    with pytest.raises(ArgumentError, match="distilled"):
        recipe.run(Own(), Data())


def test_student_inherits_the_teachers_item_geometry() -> None:
    torch.manual_seed(0)
    teacher = Ranker(dataclasses.replace(CONFIG, d=64))
    with torch.no_grad():  # items on 6 directions: a student of rank 8 can hold all of it
        teacher.item_embedding.weight.copy_(torch.randn(1200, 6) @ torch.randn(6, 64))
        teacher.item_embedding.weight[0] = 0
    config = dataclasses.replace(CONFIG, d=16, item_dim=8)
    student = make_student(teacher, config)
    ids = torch.arange(1200)
    guide = teacher.item_embedding(ids)
    own = student.item_proj(student.item_embedding(ids))
    torch.testing.assert_close(own @ own.T, guide @ guide.T, rtol=1e-3, atol=1e-2)
    assert bool((student.item_embedding.weight[0] == 0).all())


def test_recipe_round_trips_through_json_and_refuses_nonsense() -> None:
    recipe = Recipe(
        prune=BlockPruning(sparsity=0.75, embedding_block=None),
        quantize=Int8("percentile", percentile=99.9),
        qat=None,
        seed=7,
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"prune": {"sparsity": 0.5}}).prune.sparsity == 0.5
    for values, name in (
        ({"speed": 1}, "recipe"),
        ({"prune": {"speed": 1}}, "prune"),
        ({"prune": 0.4}, "prune"),
        ({"qat": {"steps": -1}}, "steps"),
        ({"finetune": {"lr": "fast"}}, "lr"),
        ({"seed": -1}, "seed"),
        ({"n_candidates": 1}, "n_candidates"),
        ({"distill": {"share": 0}}, "share"),
        ({"quantize": {"calibration_method": "best"}}, "calibration_method"),
        ({"prune": {"type": "Lottery"}}, "type"),
        ({"prune": {"type": "NMPruning", "sparsity": 0.4}}, "prune"),
        ({"replace": [{"type": "LowRank"}]}, "replace"),
        ({"replace": [{"type": "Grouped", "groups": 1}]}, "groups"),
        ({"distill": {"hidden": -1}}, "weight"),
    ):
        with pytest.raises(ArgumentError, match=name):
            Recipe.from_dict(values)
    with pytest.raises(ArgumentError, match="variants"):
        recipe.run(baseline(), Data(), variants=("tiny",))


def test_other_patterns_replaced_layers_and_hidden_states(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE,
        prune=NMPruning(2, 4, rounds=2),
        replace=(WindowSparse(AttentionPattern(window=2)), LowRank(16)),
        distill=dataclasses.replace(RECIPE.distill, hidden=0.5, attention=0.0),
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert any(isinstance(term, HiddenStates) for term in recipe.distill.losses())
    stages: list[str] = []
    made = recipe.run(
        baseline(), Data(), out=tmp_path, variants=("pruned_quantized", "distilled"),
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert {"replaced: WindowSparse", "replaced: LowRank"} <= set(stages)
    model = made["pruned_quantized"]
    assert isinstance(model.blocks[0].attention, WindowSparseAttention)
    assert isinstance(model.tower[0], LowRankLinear)
    weight = load(tmp_path / "pruned").tower[0].up.weight
    assert bool(((weight != 0).view(-1, 4).sum(1) <= 2).all())
    # The teacher is the baseline, as it came.
    assert not isinstance(made["distilled"].blocks[0].attention, WindowSparseAttention)
    data = Data()
    recipe.run(baseline(), data, out=tmp_path, variants=("pruned_quantized",))
    assert data.calls == 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    import fastrec.data
    from fastrec.compress.cli import compress

    class Opened:
        @staticmethod
        def open(path: Path) -> Data:
            return Data()

    monkeypatch.setattr(fastrec.data, "SequenceDataset", Opened, raising=False)
    app = typer.Typer()
    app.command()(compress)
    save(baseline(), tmp_path / "model")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE.to_dict()))
    arguments = [str(tmp_path / name) for name in ("model", "data", "out")]
    options = ["--recipe", str(recipe), "--variants", "baseline,pruned_quantized"]
    options += ["--json", str(tmp_path / "report.json"), "--sparsity", "0.5", "--qat-steps", "0"]
    options += ["--levels", "31"]
    result = CliRunner().invoke(app, arguments + options, catch_exceptions=False)
    assert result.exit_code == 0
    assert "pruned_quantized" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["variant"] for row in report["variants"]] == ["baseline", "pruned_quantized"]
    assert report["recipe"]["prune"]["sparsity"] == 0.5
    assert report["variants"][1]["bytes"] == artifact_bytes(tmp_path / "out" / "pruned_quantized")
    layer = load(tmp_path / "out" / "pruned_quantized").tower[0]
    assert layer.density < 0.7
    assert layer.values.abs().max() == report["recipe"]["quantize"]["levels"] == 31
    options = ["--variants", "pruned", "--nm", "1:4", "--replace", "window:2", "--hidden", "0.5"]
    options += ["--replace", "low_rank:16", "--finetune-steps", "1", "--json"]
    result = CliRunner().invoke(
        app, [*arguments, *options, str(tmp_path / "report.json")], catch_exceptions=False
    )
    assert result.exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())["recipe"]
    assert report["prune"]["type"] == "NMPruning"
    assert [part["type"] for part in report["replace"]] == ["WindowSparse", "LowRank"]
    assert report["distill"]["hidden"] == 0.5
    for wrong, name in (
        (["--nm", "half"], "nm"),
        (["--nm", "2:4", "--sparsity", "0.5"], "sparsity"),
        (["--replace", "window"], "replace"),
        (["--levels", "0"], "levels"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(refused.exception, ArgumentError)
        assert name in str(refused.exception)
    missing = CliRunner().invoke(app, ["/nowhere", *arguments[1:]])
    assert isinstance(missing.exception, ArgumentError)


def test_importing_the_command_loads_no_torch() -> None:
    code = "import sys, fastrec.compress.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""sensitivity: ranks layers by what they cost, leaves the model alone, chooses for the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastrec.compress import BlockPruning, Int8, NMPruning, prune_, quantize_, sensitivity
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import SparseInt8Linear


class Model(nn.Module):
    """Two branches; the first decides everything, the second nearly nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + 1e-3 * self.quiet(x)


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def evaluator() -> object:
    target = Model()(X).detach()
    return lambda model: float((model(X) - target).square().mean())


def test_the_layer_that_matters_is_found_and_left_out(tmp_path: Path) -> None:
    model = Model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps: list[tuple[str, int, int]] = []
    report = sensitivity(
        model,
        evaluator(),
        prune=BlockPruning(0.5),
        quantize=Int8(),
        calibration=[X],
        progress=lambda *step: steps.append(step),
    )
    assert report.baseline == 0
    assert [s[1:] for s in steps] == [(1, 3), (2, 3), (3, 3)]
    loud, quiet = report.layers["loud"], report.layers["quiet"]
    assert loud.pruned > 1e4 * quiet.pruned > 0
    assert loud.quantized > 1e4 * quiet.quantized > 0
    assert report.layers["unused"].quantized is None  # no batch reaches it
    assert report.layers["unused"].pruned == 0

    # The model is as it was.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.loud) is nn.Linear
    assert model.training

    limit = quiet.pruned * 10
    assert report.too_sensitive(limit) == ["loud"]
    prune_(model, BlockPruning(0.5), report.keep(limit, "pruned"))
    assert bool((model.loud.weight != 0).all())
    assert bool((model.quiet.weight == 0).any())
    quantize_(model, Int8(), [X], report.keep(limit))
    assert type(model.loud) is nn.Linear
    assert isinstance(model.quiet, SparseInt8Linear)

    lines = report.table().splitlines()
    assert lines[1].startswith("loud")
    assert len(lines) == 4
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the report extra")
    report = sensitivity(Model(), evaluator(), prune=NMPruning(), filter_fn=["loud", "quiet"])
    data = report.plot(tmp_path / "plot.png")
    assert data.startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").read_bytes() == data


def test_bad_input_is_refused_and_the_model_untouched() -> None:
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ArgumentError, match="neither"):
        sensitivity(model, evaluator())
    with pytest.raises(ArgumentError, match="calibration"):
        sensitivity(model, evaluator(), quantize=Int8())
    with pytest.raises(ArgumentError, match="calibration"):
        sensitivity(model, evaluator(), quantize=Int8(), calibration=[])
    with pytest.raises(DtypeError, match="evaluate"):
        sensitivity(model, 0.5, prune=BlockPruning(0.5))
    with pytest.raises(ArgumentError, match="filter_fn"):
        sensitivity(model, evaluator(), prune=BlockPruning(0.5), filter_fn="loudest")
    with pytest.raises(ArgumentError, match="none"):
        sensitivity(nn.ReLU(), evaluator(), prune=BlockPruning(0.5))
    calls = iter([0.0, float("nan")])
    with pytest.raises(ArgumentError, match="nan for loud"):
        sensitivity(model, lambda m: next(calls), prune=BlockPruning(0.5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = sensitivity(model, evaluator(), prune=BlockPruning(0.5), filter_fn="loud")
    with pytest.raises(ArgumentError, match="limit"):
        report.keep(-1.0)
    with pytest.raises(ArgumentError, match="technique"):
        report.keep(1.0, "distilled")

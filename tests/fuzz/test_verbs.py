"""Random small models through the verbs: an engine is what was compiled, a report is what happened.

Runs that are resumed: tests/compress/test_qat.py.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fastrec
from fastrec.errors import ArgumentError, FastrecError
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.runtime import available_backends

ROWS, LENGTH = 60, 5
few = settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


class Random(nn.Module):
    """A table, layers of drawn kinds over a pooled or whole history, scores of a few outputs or of
    the table's rows.

    Args:
        kinds: of the layers between.
        width: of the table.
        pooled: whether the history is summed before the layers.
        head: "linear", "tied" (one parameter), or "table" (a product with the table's weight).
        seed: of the weights.
    """

    def __init__(self, kinds: list[str], width: int, pooled: bool, head: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        makers = {
            "linear": lambda: nn.Linear(width, width),
            "wide": lambda: nn.Sequential(
                nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
            ),
            "normed": lambda: weight_norm(nn.Linear(width, width)),
            "layer norm": lambda: nn.LayerNorm(width),
            "gelu": nn.GELU,
            "dropout": lambda: nn.Dropout(0.3),
        }
        self.table = nn.Embedding(ROWS, width)
        self.layers = nn.Sequential(*(makers[kind]() for kind in kinds))
        self.pooled, self.kind = pooled, head
        if head != "table":
            self.head = nn.Linear(width, ROWS if head == "tied" else 7, bias=head != "tied")
        if head == "tied":
            self.head.weight = self.table.weight

    def forward(self, item: Tensor) -> Tensor:
        x = self.table(item)
        x = self.layers(x.sum(1) if self.pooled else x)
        x = x if self.pooled else x.mean(1)
        return x @ self.table.weight.T if self.kind == "table" else self.head(x)


models = st.builds(
    Random,
    st.lists(
        st.sampled_from(["linear", "wide", "normed", "layer norm", "gelu", "dropout"]),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([8, 16, 20]),
    st.booleans(),
    st.sampled_from(["linear", "tied", "table"]),
    st.integers(0, 99),
)


def request(batch: int, seed: int) -> Tensor:
    return torch.randint(ROWS, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def scores(model: nn.Module, item: Tensor) -> Tensor:
    with torch.no_grad():
        return model(item)


def near(found: Tensor, wanted: Tensor, share: float) -> None:
    """Within a share of the spread of what is wanted."""
    assert (found - wanted).abs().max() <= share * max(wanted.std().item(), 1e-3)


@pytest.mark.parametrize("backend", ["native", "torch", "onnxruntime", "openvino"])
def test_what_becomes_of_the_model_changes_no_engine(backend: str) -> None:
    if (reason := available_backends()[backend]) is not None:
        pytest.skip(reason)

    @settings(few, max_examples=6 if backend in ("native", "torch") else 2)
    @given(model=models, change=st.sampled_from(["noise", "prune", "quantise", "train", "zero"]))
    def check(model: nn.Module, change: str) -> None:
        model.eval()
        batches = [request(4, 1), request(2, 2)]
        engine = fastrec.compile(model, (batches[0],), backend, 1, fallback="error")
        before = [engine(x).clone() for x in batches]
        for x, found in zip(batches, before, strict=True):
            torch.testing.assert_close(found, scores(model, x), rtol=1e-4, atol=1e-4)
        if change == "noise":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
        elif change == "zero":
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data.zero_()
        elif change == "train":
            model.train()
        else:
            try:
                if change == "prune":
                    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.4, block=(4, 4)))
                else:
                    fastrec.quantize_(model, fastrec.Int8(), calibration=batches)
            except FastrecError:
                return
        for x, found in zip(batches, before, strict=True):
            assert torch.equal(engine(x), found)

    check()


@few
@given(model=models)
def test_what_quantising_reports_is_what_the_model_became(model: nn.Module) -> None:
    model.eval()
    batches = [request(8, seed) for seed in range(3)]
    wanted = scores(model, batches[0])
    try:
        report = fastrec.quantize_(model, fastrec.Int8(), calibration=batches)
    except ArgumentError:  # nothing that may be quantised
        assert torch.equal(scores(model, batches[0]), wanted)
        return
    int8 = {n for n, m in model.named_modules() if isinstance(m, SparseInt8Linear | Int8Embedding)}
    assert set(report.layers) | set(report.tables) == int8
    assert not int8 & set(report.left)
    found = scores(model, batches[0])
    near(found, wanted, 0.6)
    engine = fastrec.compile(model, (batches[0],), "native", 1, fallback="error")
    near(engine(batches[0]), found, 0.1)
    near(engine(batches[1][:3]), scores(model, batches[1][:3]), 0.1)


@few
@given(model=models, place=st.integers(0, 5), pre=st.booleans())
def test_a_hook_still_counts_once_its_layer_is_int8(
    model: nn.Module, place: int, pre: bool
) -> None:
    model.eval()
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    layer = layers[place % len(layers)]
    if pre and isinstance(layer, nn.Linear):
        layer.register_forward_pre_hook(lambda module, given: (given[0] * 3,))
    else:
        layer.register_forward_hook(lambda module, given, found: found * 3)
    batches = [request(8, seed) for seed in range(3)]
    wanted = scores(model, batches[0])
    try:
        fastrec.quantize_(model, fastrec.Int8(), calibration=batches)
    except FastrecError:
        return
    near(scores(model, batches[0]), wanted, 0.6)


@few
@given(model=models, prune=st.booleans(), quantise=st.booleans())
def test_what_is_saved_is_what_is_loaded(model: Random, prune: bool, quantise: bool) -> None:
    model.eval()
    fresh = copy.deepcopy(model)
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        tensor.data.add_(1)
    batches = [request(8, seed) for seed in range(3)]
    if prune:
        with contextlib.suppress(ArgumentError):  # nothing that may be pruned
            report = fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.4, block=(4, 4)))
            named = dict(model.named_modules())
            for name, layer in report.layers.items():
                if name in named:
                    weight = named[name].weight
                    assert abs((weight != 0).float().mean().item() - layer.kept) < 0.02, name
    if quantise:
        with contextlib.suppress(ArgumentError):
            fastrec.quantize_(model, fastrec.Int8(), calibration=batches)
    with TemporaryDirectory() as folder:
        fastrec.save(model, Path(folder) / "model")
        loaded: Any = fastrec.load(Path(folder) / "model", fresh)
    assert torch.equal(scores(loaded, batches[0]), scores(model, batches[0]))
    if model.kind == "tied" and not quantise:
        assert loaded.head.weight is loaded.table.weight

"""A fault inside a step names what the caller passed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastrec
from fastrec.errors import ArgumentError, IdRangeError
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime.engine import Engine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


class Sequence(nn.Module):
    """Two inputs that meet in one lookup, and positions that follow from one."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.ages = nn.Embedding(50, 4), nn.Embedding(7, 4)

    def forward(self, history: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([history, target[:, None]], 1)
        return self.items(ids).sum((1, 2)) + self.ages(history[:, :1] - history[:, 1:2]).sum((1, 2))


@pytest.fixture(scope="module")
def engine() -> Engine:
    inputs = [torch.tensor([[3, 1, 5]] * 2), torch.tensor([4, 4])]
    return fastrec.compile(Sequence().eval(), inputs, backend="native", fallback="error")


@pytest.mark.parametrize(
    ("history", "target", "message"),
    [
        ([[3, 1, 50]], [4], r"history: expected ids in 0\.\.49, got 50"),
        ([[3, 1, 5]], [-2], r"target: expected ids in 0\.\.49, got -2"),
        ([[9, 1, 5]], [8], r"history: expected values of which ages gets ids in 0\.\.6, got 8"),
        ([[1, 3, 5]], [4], r"history: expected values of which ages gets ids in 0\.\.6, got -2"),
    ],
)
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_an_id(engine: Engine, kind: Any, history: Any, target: Any, message: str) -> None:
    inputs = [kind([[3, 1, 5]] * 2), kind([4, 4])]
    good = engine(*inputs)
    with pytest.raises(IdRangeError, match=message):
        engine(kind(history), kind(target))
    assert (engine(*inputs) == good).all()


def test_parts_of_a_split_plan() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(50, 4)

        def forward(self, history: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
            return (self.items(history).sum(1, keepdim=True) * self.items(candidates)).sum(-1)

    inputs = [torch.tensor([[3, 1, 5]] * 2), torch.tensor([[4, 4]] * 2)]
    engine = fastrec.compile(Scorer().eval(), inputs, backend="native", fallback="error")
    with pytest.raises(IdRangeError, match=r"history: expected ids in 0\.\.49, got 77"):
        engine.encode(inputs[0] * 0 + 77, candidates="candidates")
    state = engine.encode(inputs[0], candidates="candidates")
    with pytest.raises(IdRangeError, match=r"candidates: expected ids in 0\.\.49, got 78"):
        engine.score(state, inputs[1] * 0 + 78)
    torch.testing.assert_close(engine.score(state, inputs[1]), engine(*inputs))


def test_a_nan() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.layer(a + b)

    model, inputs = Two().eval(), [torch.randn(2, 32), torch.randn(2, 32)]
    fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    engine = fastrec.compile(model, inputs, backend="native", fallback="error")
    with pytest.raises(ArgumentError, match="b: expected an input of numbers, got a NaN"):
        engine(inputs[0], inputs[1] * float("nan"))

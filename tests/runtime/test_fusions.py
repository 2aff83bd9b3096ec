"""Passes recognise and fold: one step where a model spells out several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from idioms import Idioms, agrees, draw
from torch import Tensor, nn

import fastrec
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime.engine import Engine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def kinds(engine: Engine) -> Counter[str]:
    return Counter(row["op"] for row in engine.describe() if "kernel" in row)


def rows(batch: int) -> tuple[Tensor]:
    return (draw(batch, 5, 8, seed=batch),)


GELUS = {
    "half first": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "half last": lambda x: (1 + torch.erf(x * 0.70710678)) * x / 2,
    "erfc": lambda x: x * (1 - (0.5 - 0.5 * torch.erf(x / 1.41421356))),
}


@pytest.mark.parametrize("spelling", GELUS)
def test_gelu_by_erf_becomes_the_layers_activation(spelling: str) -> None:
    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 40), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(GELUS[spelling](self.up(x)))

    assert kinds(agrees(Gelu(), rows)) == {"linear": 2}


@pytest.mark.parametrize(
    ("spelled", "same"),
    [
        (lambda x: x / (1 + torch.exp(-x)), F.silu),
        (lambda x: 1 / (1 + torch.exp(-x)), torch.sigmoid),
        (lambda x: 2 * torch.sigmoid(2 * x) - 1, torch.tanh),
    ],
)
def test_functions_are_known_by_their_values(
    spelled: Callable[[Tensor], Tensor], same: Callable[[Tensor], Tensor]
) -> None:
    x = torch.cat([draw(300), torch.tensor([0.0, 120, -120, torch.inf, -torch.inf])])
    found = [
        fastrec.compile(Idioms({"y": f}), (x[None],), "native", fallback="error")(x[None])["y"]
        for f in (spelled, same)
    ]
    assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0))


def test_what_overflows_to_nan_in_torch_does_so_here() -> None:
    spelled = {"sigmoid": lambda x: torch.exp(x) / (1 + torch.exp(x))}
    agrees(spelled, lambda batch: (120 * draw(batch, 50, seed=batch),))


def test_another_function_is_not_taken_for_gelu() -> None:
    functions = {
        "by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
        "by sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
        "without a half": lambda x: x * (1.0 + torch.erf(x / math.sqrt(2.0))),
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "softsign of exp": lambda x: torch.exp(x) / (1 + torch.exp(x)),
    }
    agrees(functions, lambda batch: (3 * draw(batch, 700, seed=batch),))


class Normed(nn.Module):
    """Linear layers with batch norm behind them, whose statistics are no identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 40), nn.Linear(40, 3, bias=False)
        self.norm, self.last = nn.BatchNorm1d(40), nn.BatchNorm1d(3, affine=False)
        for norm in (self.norm, self.last):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.1, 4)
        nn.init.uniform_(self.norm.weight, -2, 2)
        nn.init.uniform_(self.norm.bias, -2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        return torch.sigmoid(self.last(self.second(h)))


def test_batch_norm_folds_into_the_layer_before_it() -> None:
    engine = agrees(Normed(), lambda batch: (draw(batch, 8, seed=batch),))
    assert kinds(engine) == {"linear": 2, "map": 1}


def test_a_result_that_others_read_keeps_its_scale() -> None:
    class Shared(Normed):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.norm(h).sum(1, keepdim=True) + h

    agrees(Shared(), lambda batch: (draw(batch, 8, seed=batch),))


def test_maps_fuse_through_copies_that_reorder() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6 * 4, 5, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            outer = torch.einsum("bhd,bmd->bhmd", x, y)
            return self.conv(outer.reshape(x.size(0), -1, 7)).sum(-1)

    engine = agrees(Outer(), lambda b: (draw(b, 6, 7, seed=b), draw(b, 4, 7, seed=b)))
    assert kinds(engine)["map"] == 2  # the products, in the layer's order; the sums' order


class Convolutions(nn.Module):
    """Windows that are read in place: dilated and padded, strided, over whole rows, of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.causal = nn.Conv1d(16, 24, 3, dilation=2, padding=4)
        self.strided = nn.Conv1d(16, 8, 2, stride=3, bias=False)
        self.rows = nn.Conv2d(1, 5, (3, 16))
        self.image = nn.Conv2d(16, 6, (1, 2), padding=(0, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        channels = x.transpose(1, 2)
        return {
            "causal": torch.relu(self.causal(channels))[:, :, :9],
            "strided": self.strided(channels),
            "rows": self.rows(x.unsqueeze(1)).squeeze(3),
            "image": self.image(channels.unsqueeze(2)).squeeze(2),
        }


def test_convolutions_read_their_windows_in_place() -> None:
    engine = agrees(Convolutions(), lambda batch: (draw(batch, 9, 16, seed=batch),))
    assert kinds(engine)["window_linear"] == 4
    assert kinds(engine)["linear"] == 0

"""Corners of torch's arithmetic that a plan has to follow: NaN, infinities, integers that wrap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from idioms import agrees, draw, ids
from torch import Tensor

import fastrec
from fastrec.errors import ArgumentError, BackendError
from fastrec.kernels._compiled import reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

INFINITY = float("inf")
LOWEST = torch.finfo(torch.float32).min


def floats(batch: int) -> tuple[Tensor]:
    return (draw(batch, 6, 4, seed=batch) * 1.5,)


def nans(x: Tensor) -> Tensor:
    return torch.where(x > 1, torch.log(-x.abs()), x)


def infinite(x: Tensor) -> Tensor:
    return torch.where(x > 1, INFINITY, torch.where(x < -1, -INFINITY, x))


NANS: dict[str, Any] = {
    "smallest": lambda x: list(nans(x).min(1)),
    "largest": lambda x: list(nans(x).max(1)),
    "where the smallest is": lambda x: nans(x).argmin(1),
    "where the largest is": lambda x: nans(x).argmax(-1),
    "reductions": lambda x: [nans(x).amax(1), nans(x).amin(-1), nans(x).sum(1), nans(x).any(1)],
    "bounds": lambda x: [nans(x).clamp(-0.5, 0.5), nans(x).relu(), F.relu6(nans(x))],
    "two": lambda x: [torch.maximum(nans(x), x * 0.3), torch.minimum(x * 0.3, nans(x))],
    "order": lambda x: list(torch.sort(nans(x), dim=1, stable=True)),
    "softmax": lambda x: torch.softmax(nans(x), -1),
    "comparisons": lambda x: [nans(x) > 0, nans(x) <= 0, nans(x) != nans(x), nans(x) == x],
    "as bool": lambda x: [nans(x).bool(), nans(x).sign(), torch.isfinite(nans(x))],
}
INFINITE: dict[str, Any] = {
    "softmax": lambda x: torch.softmax(infinite(x), -1),
    "log softmax": lambda x: F.log_softmax(infinite(x), -1),
    "a row of nothing": lambda x: torch.softmax(torch.where(x[..., :1] > 0, x, -INFINITY), -1),
    "a row of the lowest": lambda x: torch.softmax(torch.where(x[..., :1] > 0, x, LOWEST), -1),
    "the lowest added": lambda x: torch.softmax(x + torch.where(x[..., :1] > 0, 0.0, LOWEST), -1),
    "log of nothing": lambda x: torch.logsumexp(torch.where(x[..., :1] > 0, x, -INFINITY), -1),
    "remainders": lambda x: [torch.remainder(x, v) for v in (0.0, INFINITY, -INFINITY, 0.3)],
    "quotients": lambda x: [
        torch.div(x, v, rounding_mode="floor") for v in (0.0, 0.1, INFINITY, -0.7)
    ],
    "quotients of tenths": lambda x: torch.round(x * 10) / 10 // 0.1,
    "saturated": lambda x: [F.silu(x * 200), F.sigmoid(x * 200), F.softplus(x * 100), x.tanh()],
    "powers": lambda x: [infinite(x) ** 0.5, infinite(x) ** -1, x**0, (x * 0) ** 0.5, x.pow(x)],
    "hidden": lambda x: infinite(x) * (x < 1),
}
BOOLS: dict[str, Any] = {
    "a sum of two": lambda x: ((x > 0) + (x > 0.5)).long(),
    "filled": lambda x: (x > 0).masked_fill(x > 0.5, -1).long(),
    "filled by infinity": lambda x: (x > 0).masked_fill(x > 0.5, INFINITY).float(),
}
CONSTANTS: dict[str, Any] = {
    "a product along the batch": lambda x: torch.full_like(x[:, 0], -2.5).mT @ x[:, 1],
    "of constants": lambda x: torch.full_like(x[:, 0], -2.5).mT @ torch.full_like(x[:, 0], 2.0),
    "nothing hidden": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.ones(x.shape[0], 6, 6, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("name", NANS)
def test_a_nan(name: str) -> None:
    agrees({name: NANS[name]}, floats)


@pytest.mark.parametrize("functions", [INFINITE, BOOLS, CONSTANTS], ids=["inf", "bool", "same"])
def test_corners(functions: dict[str, Any]) -> None:
    agrees(functions, floats)


@pytest.mark.parametrize("hidden", [-INFINITY, LOWEST, -1e9])
def test_attention_of_a_user_without_a_key(hidden: float) -> None:
    class Own(torch.nn.Module):
        def forward(self, x: Tensor, pad: Tensor) -> Any:
            mask = torch.zeros(()).masked_fill(pad[:, None, :], hidden)
            scores = x @ x.mT
            return {
                "sdpa": F.scaled_dot_product_attention(x, x, x, attn_mask=mask),
                "heads": F.scaled_dot_product_attention(
                    *[x.unflatten(-1, (2, 2)).transpose(1, 2)] * 3, attn_mask=mask[:, None]
                ),
                "added": torch.softmax(scores / 2 + mask, -1) @ x,
                "filled": torch.softmax(scores.masked_fill(pad[:, None, :], hidden), -1) @ x,
            }

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        length = ids(7, batch, 1, seed=batch)
        length[:1] = 0
        return (*floats(batch), torch.arange(6) >= length)

    agrees(Own(), inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_narrow_integers_wrap(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)

    def inputs(batch: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, 6, 4)
        return (torch.randint(limits.min, limits.max, shape, generator=generator, dtype=dtype),)

    functions: dict[str, Any] = {
        "a sum of products": lambda a: (a * a).sum(-1),
        "compared": lambda a: [a * 2 > a, a + a < 0, -a > 0, 5 - a > a, a.abs() < 0],
        "long": lambda a: (a * 3 - 7).long(),
        "squared": lambda a: (a**2).float(),
        "narrowed": lambda a: a.long().mul(70_000).short().float(),
        "running": lambda a: a.cumsum(1, dtype=torch.int32) % 1000,
        "quotients": lambda a: [a // 7, a // -7, a % 7, a % -7],
    }
    agrees(functions, inputs)


def test_integers_of_8_bits_are_refused_by_name() -> None:
    class Bytes(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.uint8) * 1.0

    with pytest.raises(BackendError, match="uint8"):
        fastrec.compile(Bytes(), floats(2), "native", 1, fallback="error")


@pytest.mark.parametrize("threads", [1, 2])
def test_an_integer_divided_by_zero_is_refused(threads: int) -> None:
    class Shares(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a // b + a % b).float()

    a, b = ids(9, 40, 70), 1 + ids(8, 40, 70)
    engine = fastrec.compile(Shares(), (a, b), "native", threads, fallback="error")
    assert torch.equal(engine(a, b), Shares()(a, b))
    broken = b.clone()
    broken[39, 69] = 0
    with pytest.raises(ArgumentError, match="0"):
        engine(a, broken)
    assert torch.equal(engine(a, b), Shares()(a, b))

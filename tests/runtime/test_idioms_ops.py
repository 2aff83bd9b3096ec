"""Ops of public recommenders, many in one model: elementwise, reductions, indexing, order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from idioms import agrees, draw, ids
from torch import Tensor, nn

import fastrec
from fastrec.errors import BackendError, IdRangeError
from fastrec.kernels._compiled import reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def floats(batch: int) -> tuple[Tensor]:
    return (draw(batch, 6, 4, seed=batch),)


def changed_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y *= x
    y[:, 0] = 3.0
    y[:, 1:3] = x[:, :2]
    y.masked_fill_(x > 1, -1.0)
    return y


ELEMENTWISE: dict[str, Any] = {
    "in place": changed_in_place,
    "erf gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "powers": lambda x: x**2 + x.pow(3) - x.abs() ** 0.5 + (x.abs() + 1) ** -1 + 2.0**x,
    "power of tensors": lambda x: (x.abs() + 0.1) ** x,
    "leaky": lambda x: F.leaky_relu(x) + F.elu(x) + F.softplus(x) + F.hardsigmoid(x) + F.mish(x),
    "sign": lambda x: torch.sign(x) * x.sign(),
    "rounding": lambda x: torch.floor(x) + torch.ceil(x) * 2 + torch.trunc(x * 3) + x.round(),
    "trigonometry": lambda x: torch.sin(x) * torch.cos(x),
    "logarithms": lambda x: torch.log1p(x.abs()) + torch.expm1(x) + torch.log2(x.abs() + 1),
    "remainder": lambda x: torch.remainder(x * 5, 3.0) + (x * 7) % -2.0,
    "floor division": lambda x: torch.div(x * 9, 2.0, rounding_mode="floor"),
    "nan to num": lambda x: torch.nan_to_num((x - x) / (x - x), nan=0.5),
    "isinf": lambda x: torch.isinf(x / 0.0) & ~torch.isnan(x),
    "clamp": lambda x: x.clamp(min=-0.5, max=0.7).clamp_min(0.1),
    "double": lambda x: (
        (x.double() * 3).float() + x.to(torch.float64).sum(-1, keepdim=True).float()
    ),
    "bool arithmetic": lambda x: (x > 0) * x + (x > 0.5).float() - (x < 0).long(),
    "logic": lambda x: torch.logical_xor(x > 0, x > 1) | torch.logical_not(x.bool()),
    "integers": lambda x: ((x * 10).long() // 3) * ((x * 10).long() % 3) - (x * 7).int(),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x > 1, 9.0),
    "sigmoid": lambda x: torch.sigmoid(x) + F.logsigmoid(x) + torch.reciprocal(x.exp()),
}
SHAPES: dict[str, Any] = {
    "stack": lambda x: torch.stack([x, x * 2], 1).sum(1),
    "repeat": lambda x: x[:, :1].repeat(1, 6, 1) * x,
    "repeat rows": lambda x: x.repeat(1, 2, 3),
    "repeat interleave": lambda x: x.repeat_interleave(2, dim=1),
    "view as": lambda x: x.reshape(x.shape[0], -1).view_as(x) * x.new_ones(1),
    "flip": lambda x: x.flip(1) - x,
    "roll": lambda x: torch.roll(x, 2, dims=1),
    "strided": lambda x: x[:, ::2] + x[:, 1::2],
    "triangle": lambda x: torch.tril(x @ x.transpose(1, 2)) + torch.triu(x @ x.mT, 1),
    "causal mask": lambda x: (x @ x.mT).masked_fill(torch.tril(torch.ones(6, 6)) == 0, -1e9),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "einsum": lambda x: torch.einsum("bld,bkd->blk", x, x * 2),
    "outer": lambda x: torch.einsum("bi,bj->bij", x[:, 0], x[:, 1]),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2.0),
    "chunks": lambda x: torch.cat([part * i for i, part in enumerate(x.chunk(2, dim=-1))], -1),
    "heads in the batch": lambda x: torch.cat(
        torch.cat(x.split(2, dim=2), 0).split(x.shape[0], dim=0), dim=2
    ),
}
REDUCTIONS: dict[str, Any] = {
    "max": lambda x: x.max(dim=1).values + x.min(dim=1)[0],
    "max positions": lambda x: x.max(dim=2)[1],
    "argmax": lambda x: x.argmax(-1) - x.argmin(1, keepdim=True).sum(-1),
    "any": lambda x: (x > 0).any(-1) & (x > -1).all(dim=2),
    "var": lambda x: x.var(-1) + x.std(1).sum(-1, keepdim=True) + x.var(-1, unbiased=False),
    "norms": lambda x: (
        F.normalize(x, dim=-1) + x.norm(dim=-1, keepdim=True) + x.norm(p=1, dim=1, keepdim=True)
    ),
    "logsumexp": lambda x: torch.logsumexp(x, dim=1),
    "log softmax": lambda x: F.log_softmax(x, dim=-1),
    "cumsum": lambda x: torch.cumsum(x > 0, dim=1) + x.cumsum(-1).long(),
    "several dims": lambda x: x.sum((1, 2)) + x.amax((1, 2)) - x.mean((0 + 1, 2)),
    "topk": lambda x: list(torch.topk(x, 3, dim=1)),
    "smallest": lambda x: torch.topk(x, 2, dim=-1, largest=False)[0],
    "sort": lambda x: tuple(torch.sort(x, dim=1, descending=True)),
    "argsort": lambda x: x[:, :, 0].argsort(dim=-1),
}


@pytest.mark.parametrize(
    "functions", [ELEMENTWISE, SHAPES, REDUCTIONS], ids=["elementwise", "shapes", "reductions"]
)
def test_ops_of_floats(functions: dict[str, Any]) -> None:
    agrees(functions, floats)


def test_a_tie_goes_to_the_first() -> None:
    def tied(batch: int) -> tuple[Tensor]:
        return (ids(3, batch, 7, seed=batch).float(),)

    agrees({"argmax": lambda x: x.argmax(-1), "sort": lambda x: x.sort(stable=True)[1]}, tied)


class Lookups(nn.Module):
    """Gathers, scatters and computed tables over a history of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(50, 8, padding_idx=0)
        self.pairs = nn.Parameter(draw(4, 5, 3))

    def forward(self, item: Tensor) -> dict[str, Tensor]:
        x = self.items(item)
        length = (item > 0).sum(1)
        last = (length - 1).clamp(min=0)
        at = last.view(-1, 1, 1).expand(-1, -1, 8)
        count = torch.zeros(item.shape[0], 50).scatter_add_(1, item, torch.ones(item.shape))
        marked = torch.zeros_like(x[:, :, 0]).scatter(1, last.unsqueeze(1), 1.0)
        return {
            "last": x.gather(1, at).squeeze(1),
            "last by two indices": x[torch.arange(item.shape[0]), last],
            "any columns": x.gather(2, (item % 8).unsqueeze(-1).expand(-1, -1, 2)),
            "chosen": x.index_select(1, torch.tensor([4, 0, -2 + 3])),
            "parameters": self.pairs[item % 4, (item // 4) % 5],
            "from the end": self.pairs[-1 - item % 4],
            "computed table": F.embedding(item % 6, x.mean(0)[:6]),
            "rows": x[:, [0, 2]],
            "counts": count,
            "marked": marked,
            "position": torch.arange(item.shape[1]).unsqueeze(0).expand_as(item) * (item > 0),
            "one hot": F.one_hot(item % 5, 5).float(),
        }


def history(batch: int) -> tuple[Tensor]:
    item = ids(50, batch, 6, seed=batch)
    return (torch.where(torch.arange(6) < 1 + ids(6, batch, 1, seed=batch), item, 0),)


def test_lookups() -> None:
    agrees(Lookups(), history)


def test_ids_of_32_bits_are_read_as_they_are() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(50, 8)

        def forward(self, item: Tensor) -> Tensor:
            return self.items(item).sum((1, 2))

    agrees(Scores(), lambda batch: (ids(50, batch, 6, seed=batch).int(),))


def test_an_index_outside_its_own_dimension_is_refused() -> None:
    table = draw(4, 5)

    class Pairs(nn.Module):
        def forward(self, row: Tensor, column: Tensor) -> Tensor:
            return table[row, column]

    examples = (ids(4, 3), ids(5, 3))
    engine = fastrec.compile(Pairs(), examples, backend="native", fallback="error")
    assert torch.equal(engine(*examples), table[examples])
    assert torch.equal(engine(examples[0] - 4, examples[1]), table[examples])
    for bad in ((torch.tensor([4, 0, 0]), examples[1]), (examples[0], torch.tensor([0, -6, 0]))):
        with pytest.raises(IdRangeError):
            engine(*bad)


def test_what_no_plan_holds_is_named_at_once() -> None:
    functions = {
        "sizes from values": lambda x: torch.unique(x).sum(),
        "also": lambda x: torch.nonzero(x[0] > 0).sum() + x.sum(),
        "fine": lambda x: x * 2,
    }

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * functions["also"](x) + torch.linalg.det(x[:, :3, :3])[:, None, None]

    with pytest.raises(BackendError) as refused:
        fastrec.compile(Both(), floats(2), backend="native", fallback="error")
    text = str(refused.value)
    assert "nonzero" in text
    assert "torch.where" in text
    assert "test_idioms_ops.py" in text
    assert "det" in text

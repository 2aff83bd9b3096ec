"""``fastrec.nn``'s layers, products and sums against torch: values, batches 1 to 8, lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrec
from fastrec.errors import BackendError, IdRangeError
from fastrec.kernels._compiled import reason_missing
from fastrec.nn import (
    GroupedLinear,
    HstuBlock,
    LowRankLinear,
    SeparableProjection,
    WindowSparseAttention,
)
from fastrec.runtime import load_engine
from fastrec.runtime.engine import Engine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        # A module's parameters are part of the model.
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class WithLengths(nn.Module):
    """A layer on sequences that end."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        result = self.layer(x, lengths=lengths)
        return result if isinstance(result, torch.Tensor) else result[0]


def some(batch: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + sum(shape))
    return torch.randn(batch, *shape, generator=generator)


def agrees(model: nn.Module, draw: Any, tmp_path: Path | None = None) -> Engine:
    """One engine for batches 1 to 8, of the model's answers; its file gives the same bits."""
    engine = fastrec.compile(model.eval(), draw(3), backend="native", fallback="error")
    loaded = None if tmp_path is None else load_engine(engine.save(tmp_path / "e"))
    for batch in range(1, 9):
        inputs = draw(batch)
        with torch.inference_mode():
            expected = model(*inputs)
        result = engine(*inputs)
        torch.testing.assert_close(result, expected.float(), rtol=2e-5, atol=2e-5)
        if loaded is not None:
            assert torch.equal(loaded(*inputs), result)
    return engine


def ops(engine: Engine) -> list[str]:
    return [row["op"] for row in engine.describe()]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(1, 7, 5), (2, 32, 66), (4, 64, 36)])
def test_grouped_linear(
    groups: int, inputs: int, outputs: int, bias: bool, shuffle: bool, tmp_path: Path
) -> None:
    if outputs % groups:
        outputs += 1
    layer = GroupedLinear(inputs, outputs, groups, bias=bias, shuffle=shuffle)
    engine = agrees(Lambda(layer), lambda batch: [some(batch, 5, inputs)], tmp_path)
    assert ("linear" if groups == 1 else "grouped_linear") in ops(engine)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("width", [1, 3, 31])
def test_separable_projection(width: int, groups: int, causal: bool, tmp_path: Path) -> None:
    layer = SeparableProjection(24, 40, width, groups, causal=causal)
    engine = agrees(Lambda(layer), lambda batch: [some(batch, 17, 24)], tmp_path)
    assert "separable_projection" in ops(engine)


def lengths_of(batch: int, longest: int) -> torch.Tensor:
    return torch.tensor([longest, 0, 1, longest // 2, 3, 2, longest - 1, 5][:batch])


@pytest.mark.parametrize("bias", [False, True])
def test_separable_projection_with_lengths(bias: bool, tmp_path: Path) -> None:
    layer = WithLengths(SeparableProjection(16, 8, 5, 2, bias=bias))
    engine = agrees(layer, lambda b: [some(b, 9, 16), lengths_of(b, 9)], tmp_path)
    with pytest.raises(IdRangeError, match=r"lengths: .*0\.\.9, got 10"):
        engine(some(2, 9, 16), torch.tensor([3, 10]))


def test_low_rank_linear_is_two_layers() -> None:
    engine = agrees(Lambda(LowRankLinear(32, 48, 4)), lambda batch: [some(batch, 5, 32)])
    assert ops(engine).count("linear") == 2


PATTERNS = {
    "window": fastrec.AttentionPattern(window=3, offsets="none"),
    "log2": fastrec.AttentionPattern(window=2, offsets="log2"),
    "causal": fastrec.AttentionPattern(window=1, offsets=(5, 9), causal=True),
    "a list a head": fastrec.AttentionPattern(window=0, offsets=((2,), (3, 4), (), (7,))),
    "random": fastrec.AttentionPattern(window=1, offsets="random", num_random=3, max_length=40),
    "all": fastrec.AttentionPattern(window=100, offsets="none"),
}
PROJECTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped": {"groups": 2, "qk_rank": 3},
    "separable": {"kernel_size": 3},
    "low_rank": {"rank": 6},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_window_sparse_attention(name: str, tmp_path: Path) -> None:
    layer = WindowSparseAttention(32, 4, pattern=PATTERNS[name])
    model = Lambda(lambda x: x)
    model.layer = layer
    model.function = lambda x: layer(x)[0]
    for length in (1, 17, 33):
        engine = agrees(model, lambda b, length=length: [some(b, length, 32)], tmp_path)
        assert "window_sparse_attention" in ops(engine)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_window_sparse_attention_with_lengths(projection: Any, tmp_path: Path) -> None:
    layer = WindowSparseAttention(
        32, 4, pattern=PATTERNS["log2"], projection=projection, **PROJECTIONS[projection]
    )
    model = WithLengths(layer)
    engine = agrees(model, lambda b: [some(b, 19, 32), lengths_of(b, 19)], tmp_path)
    with pytest.raises(IdRangeError, match=r"lengths: .*0\.\.19, got -1"):
        engine(some(2, 19, 32), torch.tensor([3, -1]))
    rows = [r for r in engine.describe() if r["op"] == "window_sparse_attention"]
    assert rows[0]["macs"] > 0


def test_a_patterns_multiply_adds() -> None:
    layer = WindowSparseAttention(32, 4, pattern=PATTERNS["a list a head"])
    model = Lambda(lambda x: layer(x)[0])
    engine = fastrec.compile(model.eval(), [some(2, 5, 32)], backend="native", fallback="error")
    (row,) = [r for r in engine.profile([some(2, 5, 32)]) if "window" in r["op"]]
    scores = sum(int(m.sum()) for m in PATTERNS["a list a head"].mask(5, 4))
    assert row["macs"] == 2 * 2 * scores * 8


def test_the_sums_logarithms_are_not_lowered() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        out, lse = fastrec.kernels.window_sparse_attention(
            x, x, x, PATTERNS["log2"], return_lse=True
        )
        return out.sum(-1) + lse

    with pytest.raises(BackendError, match=r"window_sparse_attention.*logarithms.*nearest"):
        fastrec.compile(Lambda(both), [some(2, 4, 9, 8)], backend="native", fallback="error")


PRODUCTS = {
    "scores": lambda x: x @ x.transpose(-1, -2),
    "values": lambda x: x.transpose(-1, -2).softmax(-1) @ x,
    "by columns": lambda x: x.transpose(-1, -2) @ x,
    "outer": lambda x: x.unsqueeze(-1) @ x.unsqueeze(-2),
    "a vector": lambda x: x @ x[0, 0, 0],
    "of a vector": lambda x: x[0, 0, 0] @ x.transpose(-1, -2),
    "broadcast": lambda x: x @ x[:, :1].transpose(-1, -2),
    "a parameter": lambda x: x @ torch.linspace(-1, 1, 24).view(8, 3),
    "a vector of numbers": lambda x: x @ torch.linspace(-1, 1, 8),
    "bmm": lambda x: torch.bmm(x[:, 0], x[:, 1].mT),
    "sliced": lambda x: x[..., 2:5] @ x[..., 1:4].mT,
    "spelled-out attention": lambda x: ((x @ x.mT / 3).softmax(-1) @ x).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("length", [1, 2, 17, 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, length: int, tmp_path: Path) -> None:
    if name == "a vector":
        # The first sequence's row, for all: the batch is no batch of independent users.
        engine = fastrec.compile(
            Lambda(PRODUCTS[name]), [some(2, 3, length, 8)], backend="native", fallback="error"
        )
        torch.testing.assert_close(
            engine(some(5, 3, length, 8)), PRODUCTS[name](some(5, 3, length, 8))
        )
        return
    agrees(Lambda(PRODUCTS[name]), lambda batch: [some(batch, 3, length, 8)], tmp_path)


SUMS = {
    "cumsum": lambda x: x.cumsum(1),
    "cumsum inside": lambda x: x.cumsum(-1),
    "over the batch": lambda x: x.cumsum(0),
    "of integers": lambda x: (x > 0).cumsum(1).float(),
    "integers": lambda x: (x > 0).sum(1).float(),
    "largest integer": lambda x: (x * 9).abs().gt(1).long().mul(3).amax(-1).float(),
    "masked mean": lambda x: (x * (x > 0)).sum(1) / (x > 0).sum(1).clamp_min(1),
    "clamp": lambda x: x.clamp(-0.5, 0.25) + x.clamp(max=0) + (x > 0).sum(1, True).clamp(1),
    "pad": lambda x: F.pad(x, (1, 2)) + F.pad(x, (0, 3), value=2.5),
    "pad rows": lambda x: F.pad(x, (0, 0, 2, 1)),
    "zeros": lambda x: F.linear(x[..., :0], torch.zeros(4, 0), torch.arange(4.0)) + x[..., :1],
    "zeros without bias": lambda x: F.linear(x[..., :0], torch.zeros(4, 0)) + x[..., :1],
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_padding(name: str, tmp_path: Path) -> None:
    for sizes in ((1, 1), (3, 17), (64, 33)):
        agrees(Lambda(SUMS[name]), lambda b, sizes=sizes: [some(b, *sizes)], tmp_path)


class Hstu(nn.Module):
    """Two layers of HSTU over a history and its candidates, which stand behind it."""

    def __init__(self, targets: int | None = 5, **options: Any) -> None:
        super().__init__()
        self.targets = targets
        self.items = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(
            HstuBlock(32, 4, max_length=20, attention_dim=8, value_dim=6, **options)
            for _ in range(2)
        )
        self.head = nn.Linear(32, 1)

    def forward(
        self, items: torch.Tensor, times: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        x = self.items(items)
        for block in self.blocks:
            timed = block.time_bias is not None
            x = block(x, lengths=lengths, timestamps=times if timed else None, targets=self.targets)
        return self.head(x).squeeze(-1)


def events(batch: int, seed: int, length: int = 20) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    items = torch.randint(0, 50, (batch, length), generator=draw)
    times = torch.randint(0, 10_000_000, (batch, length), generator=draw).sort(1).values
    return items, times, torch.randint(5, length + 1, (batch,), generator=draw)


@pytest.mark.parametrize("targets", [None, 5])
@pytest.mark.parametrize("options", [{}, {"time_buckets": 9}, {"causal": False}], ids=str)
def test_layers_of_hstu_are_one_plan(options: dict[str, Any], targets: int | None) -> None:
    torch.manual_seed(0)
    model = Hstu(targets, **options).eval()
    with fastrec.compile(model, events(3, 0), "native", 2, fallback="error") as engine:
        rows = [row for row in engine.describe() if row["op"] == "pointwise_attention"]
        assert len(rows) == 2
        assert all(row["macs"] > 0 for row in rows)
        for batch in (1, 3, 8):
            inputs = events(batch, batch)
            with torch.no_grad():
                expected = model(*inputs)
            torch.testing.assert_close(engine(*inputs), expected, rtol=1e-4, atol=1e-5)
        items, times, lengths = events(3, 1)
        lengths[1] = 21
        with pytest.raises(IdRangeError, match=r"lengths.* in 0\.\.20, got 21"):
            engine(items, times, lengths)
        lengths[1] = 3 if targets else 0
        if targets:  # five candidates do not fit into three rows
            with pytest.raises(IdRangeError):
                engine(items, times, lengths)
        else:
            engine(items, times, lengths)

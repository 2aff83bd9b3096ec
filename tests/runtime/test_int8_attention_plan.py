"""Attention in 8-bit integers as steps of a native plan: torch's integers, all sizes, files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrec
from fastrec import Int8, kernels
from fastrec.errors import ArgumentError, BackendError, IdRangeError
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.models.attention import CrossAttention, KeyMask, SelfAttention, record_attention
from fastrec.nn import WindowSparseAttention
from fastrec.runtime import load_engine
from fastrec.runtime.engine import Engine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

LONGEST, WIDTH = 37, 48


class Both(nn.Module):
    """Candidates attend to a history that attends to itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.among, self.over = SelfAttention(WIDTH, 4), CrossAttention(WIDTH, 4)

    def forward(self, x: Tensor, length: Tensor, candidates: Tensor) -> Tensor:
        """[B, L, d], [B], [B, m, d] -> [B, m, d]."""
        mask = KeyMask(torch.zeros(x.shape[0], 1, 1, x.shape[1]), length)
        return self.over(candidates, self.among(x, mask), mask)


def draw(batch: int, length: int = LONGEST, candidates: int = 19) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + length)
    lengths = torch.tensor([length, 0, 1, length // 2])[torch.arange(batch) % 4]
    x = torch.randn(batch, length, WIDTH, generator=generator)
    return x, lengths, torch.randn(batch, candidates, WIDTH, generator=generator)


def quantised() -> Both:
    model = Both().eval()
    report = fastrec.quantize_(model, Int8(attention=True), calibration=[draw(4), draw(3)])
    assert report.attention == ["among", "over"]
    return model


def engine_of(model: nn.Module, threads: int | None = None) -> Engine:
    return fastrec.compile(
        model,
        draw(4),
        backend="native",
        threads=threads,
        settings={"executor": "plan"},
        dims={"x": ("B", "L", WIDTH), "length": ("B",), "candidates": ("B", "m", WIDTH)},
        limits={"L": LONGEST},
    )


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_the_integers_of_torch(isa: str, tmp_path: Path) -> None:
    """No float is summed on the way: the results are equal to the last bit, whoever runs them."""
    model = quantised()
    with kernels.force_isa(isa):
        engine = engine_of(model, 2)
        loaded = load_engine(engine.save(tmp_path / "e"), threads=1)
        sizes = itertools.product((1, 5), (LONGEST, 16, 1), (19, 50, 1))
        for batch, length, candidates in sizes:
            inputs = draw(batch, length, candidates)
            with torch.inference_mode():
                expected = model(*inputs)
            assert torch.equal(engine(*inputs), expected), (batch, length, candidates)
            assert torch.equal(loaded(*inputs), expected), (batch, length, candidates)


class Windowed(nn.Module):
    """A history whose events see a window and some far ones; v by each call's own range."""

    def __init__(self, pattern: fastrec.AttentionPattern) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = WindowSparseAttention(32, 4, pattern=pattern)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """[B, L, d], [B] -> [B, L, d]."""
        return self.attention(x, lengths=length)[0]


@pytest.mark.parametrize(
    "pattern",
    [
        fastrec.AttentionPattern(3, "log2"),
        fastrec.AttentionPattern(1, ((5, 9), (), (2,), (30,)), causal=True),
    ],
)
def test_window_sparse_attention_too(pattern: fastrec.AttentionPattern, tmp_path: Path) -> None:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        x, length, _ = draw(batch)
        return x[..., :32].contiguous(), length

    model = Windowed(pattern).eval()
    fastrec.quantize_(model, Int8(attention=True), calibration=[inputs(4)])
    engine = fastrec.compile(
        model, inputs(4), backend="native", threads=2, settings={"executor": "plan"}
    )
    loaded = load_engine(engine.save(tmp_path / "e"))
    assert "window_sparse_attention_int8" in [row["op"] for row in engine.describe()]
    for batch in (1, 4, 5):
        with torch.inference_mode():
            expected = model(*inputs(batch))
        assert torch.equal(engine(*inputs(batch)), expected)
        assert torch.equal(loaded(*inputs(batch)), expected)
    x, length = inputs(2)
    with pytest.raises(ArgumentError, match="a NaN"):
        engine(x * torch.nan, length)


def test_steps_hand_on_bytes() -> None:
    engine = engine_of(quantised(), 2)
    rows = {row["module"]: row for row in engine.profile(draw(2))}
    # u8 in, u8 out; what no step reads as floats is never written as such.
    for layer, width in (("among.in_proj", 3), ("over.q_proj", 1), ("over.kv_proj", 2)):
        events = 19 if layer == "over.q_proj" else LONGEST
        assert rows[layer]["written_bytes"] == 2 * events * width * WIDTH
    for name, queries in (("among", LONGEST), ("over", 19)):
        assert rows[name]["op"] == "window_sparse_attention_int8"
        assert rows[name]["macs"] == 2 * 2 * queries * LONGEST * WIDTH
        assert rows[name]["written_bytes"] == 2 * queries * WIDTH


def test_a_length_beyond_the_history_is_named() -> None:
    engine = engine_of(quantised(), 2)
    x, length, candidates = draw(2)
    with pytest.raises(IdRangeError, match=rf"length: .*0\.\.{LONGEST}, got {LONGEST + 1}"):
        engine(x, length + 1, candidates)
    assert torch.isfinite(engine(x, length, candidates)).all()


@pytest.fixture(scope="module")
def ranker() -> tuple[Ranker, Ranker]:
    """A float model, and the same in integers."""
    torch.manual_seed(0)
    config = RankerConfig(2000, 1000, history_length=24, d=32, ffn=64, tower=(64, 64))
    plain, model = Ranker(config).eval(), Ranker(config).eval()
    model.load_state_dict(plain.state_dict())
    report = fastrec.quantize_(model, Int8(attention=True), calibration=[requests(16)])
    assert report.attention == ["blocks.0.attention", "blocks.1.attention", "cross_attention"]
    return plain, model


def requests(batch: int, candidates: int = 30) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)

    def ids(high: int, columns: int) -> Tensor:
        return torch.randint(1, high, (batch, columns), generator=generator)

    length = torch.randint(0, 25, (batch,), generator=generator)
    return ids(2000, 24), ids(1000, 24), ids(4, 24), length, ids(2000, 30), ids(1000, 30)


def test_the_ranker_in_integers(ranker: tuple[Ranker, Ranker], tmp_path: Path) -> None:
    plain, model = ranker
    inputs = requests(64)
    with torch.inference_mode():
        expected, found = plain(*inputs), model(*inputs)
    # Rounding to 8 bits costs a few percent of the scores' spread, as in the layers.
    assert (found - expected).square().mean().sqrt() < 0.15 * expected.std()
    fastrec.save(model, tmp_path / "model")
    with torch.inference_mode():
        assert torch.equal(fastrec.load(tmp_path / "model")(*inputs), found)
    engine = fastrec.compile(model, inputs, backend="native", settings={"executor": "plan"})
    arrays = [t.numpy() for t in inputs]
    scores = engine(*arrays)
    # Norms sum floats, whose last bits may turn an integer now and then.
    assert np.abs(scores - found.numpy()).max() < 0.05 * expected.std()
    state = engine.encode(*arrays[:4])
    assert np.array_equal(engine.score(state, *arrays[4:]), scores)


def test_maps_are_recorded_from_the_bytes(ranker: tuple[Ranker, Ranker]) -> None:
    inputs = requests(8)
    recorded = []
    for model in ranker:
        with torch.inference_mode(), record_attention(model) as maps:
            model(*inputs)
        recorded.append(maps)
    for exact, rounded in zip(*recorded, strict=True):
        assert exact.shape == rounded.shape
        assert (exact.weights() - rounded.weights()).abs().mean() < 0.01


def test_causal_models_run_whole_and_say_that_they_do_not_append() -> None:
    torch.manual_seed(0)
    config = SASRecConfig(n_items=2000, max_length=20, d=32)
    model = SASRec(config).eval()
    items = torch.randint(1, 2000, (6, 20))
    length = torch.tensor([20, 1, 7, 20, 3, 12])
    report = fastrec.quantize_(model, Int8(attention=True), calibration=[(items, length)])
    assert len(report.attention) == config.n_blocks
    engine = fastrec.compile(
        model, (items, length), backend="native", settings={"executor": "plan"}
    )
    with torch.inference_mode():
        torch.testing.assert_close(engine(items, length), model(items, length), rtol=0, atol=0.05)
    with pytest.raises(BackendError, match="cannot append"):
        engine.encode(items, length, candidates=(), appendable=True)


def test_narrow_heads_and_float_projections_are_left() -> None:
    torch.manual_seed(0)
    config = RankerConfig(500, 50, d=32, ffn=64, tower=(64,), history_length=24)
    narrow = Ranker(RankerConfig(**{**config.__dict__, "encoder": {"qk_rank": 4}})).eval()
    inputs = tuple(t % 49 + (i in (0, 1, 4, 5)) for i, t in enumerate(requests(4)))
    inputs = (*inputs[:2], inputs[2] % 4, inputs[3] % 25, *inputs[4:])
    left = fastrec.quantize_(narrow, Int8(attention=True), calibration=[inputs]).left
    assert "narrower" in left["blocks.0.attention"]
    model = Ranker(config).eval()
    report = fastrec.quantize_(
        model, Int8(attention=True), calibration=[inputs], filter_fn=["blocks", "tower"]
    )
    assert report.attention == ["blocks.0.attention", "blocks.1.attention"]


def test_export_says_that_there_is_no_form(ranker: tuple[Ranker, Ranker], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="ONNX export")
    pytest.importorskip("onnxscript", reason="ONNX export")
    with pytest.raises(BackendError, match=r"8-bit integers has no ONNX form.*attention=False"):
        fastrec.export(ranker[1], tmp_path / "m.onnx", requests(2))
    assert not (tmp_path / "m.onnx").exists()

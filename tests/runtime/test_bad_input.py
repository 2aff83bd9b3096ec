"""Whatever a native engine is given: a typed error before a step runs, and it serves on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import fastrec
from fastrec.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    FastrecError,
    IdRangeError,
    ShapeError,
)
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime import load_engine
from fastrec.runtime.native.engine import PlanEngine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

MAX_BATCH, MAX_LENGTH = 6, 12
CONFIG = RankerConfig(
    n_items=1200,
    n_categories=9,
    history_length=MAX_LENGTH,
    d=32,
    category_dim=8,
    ffn=32,
    tower=(32, 16),
)
SETTINGS = {"executor": "plan", "max_batch": MAX_BATCH}


class NothingAdmitted:
    """In the native engine's place: what it has not admitted must not come again, as inputs do
    that were converted."""

    calls = 0

    def __call__(self, inputs: tuple[Any, ...], threads: int) -> None:
        self.calls += 1
        assert self.calls == 1, "a bad request would have run"


@pytest.fixture(scope="module", params=["float", "int8"])
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlanEngine]:
    """Saved and loaded, as a server has it."""
    torch.manual_seed(0)
    model = Ranker(CONFIG).eval()
    item, length = torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 2])
    inputs = (item, item, item, length, item[:, :3], item[:, :3])
    if request.param == "int8":
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    path: Path = tmp_path_factory.mktemp("engine") / "ranker.fastrec"
    with fastrec.compile(model, inputs, "native", 2, settings=SETTINGS) as built:
        built.save(path)
    with load_engine(path) as loaded:
        assert isinstance(loaded, PlanEngine)
        yield loaded


def refused(engine: PlanEngine, inputs: tuple[Any, ...], kind: type[Exception]) -> str:
    """The message; nothing was computed, and the engine answers as before."""
    good = engine.spec.sample({"B": 2, "L": 7, "m": 4}, seed=1)
    before = engine(*good)
    assert engine._native(inputs, 1) is None
    native = engine._native
    engine._native = NothingAdmitted()
    try:
        with pytest.raises(kind) as caught:
            engine(*inputs)
    finally:
        engine._native = native
    np.testing.assert_array_equal(engine(*good), before)
    return str(caught.value)


def request(batch: int = 2, length: int = 7, candidates: int = 4) -> list[Any]:
    draw = np.random.default_rng(3)

    def ids(high: int, columns: int) -> np.ndarray:
        return draw.integers(0, high, (batch, columns), dtype=np.int64)

    lengths = draw.integers(0, length + 1, batch, dtype=np.int64)
    history = [ids(CONFIG.n_items, length), ids(9, length), ids(5, length), lengths]
    return [*history, ids(CONFIG.n_items, candidates), ids(9, candidates)]


@pytest.mark.parametrize(
    ("position", "value", "name", "wanted"),
    [
        (0, 1200, "item", "0..1199"),
        (0, -1, "item", "0..1199"),
        (1, 9, "category", "0..8"),
        (2, 5, "behaviour", "0..4"),
        (3, 8, "length", "0..7"),
        (3, -1, "length", "0..7"),
        (4, 2**63 - 1, "cand_item", "0..1199"),
        (5, -(2**63), "cand_category", "0..8"),
    ],
)
def test_values_out_of_range(
    engine: PlanEngine, position: int, value: int, name: str, wanted: str
) -> None:
    inputs = request()
    inputs[position].reshape(-1)[-1] = value
    message = refused(engine, tuple(inputs), IdRangeError)
    assert name in message
    assert wanted in message
    assert str(value) in message


def test_sizes_over_the_limits(engine: PlanEngine) -> None:
    assert "1..6" in refused(engine, tuple(request(batch=MAX_BATCH + 1)), ShapeError)
    assert "1..12" in refused(engine, tuple(request(length=MAX_LENGTH + 1)), ShapeError)
    for sizes in ((0, 7, 4), (2, 0, 4), (2, 7, 0)):
        refused(engine, tuple(request(*sizes)), ShapeError)
    # On the limits, and users without history, all is well.
    largest = request(MAX_BATCH, MAX_LENGTH)
    largest[3][:] = [0, MAX_LENGTH, 0, 1, 2, 3]
    assert np.isfinite(engine(*largest)).all()


def test_kinds_and_counts(engine: PlanEngine) -> None:
    good = request()
    for other in (None, "ids", 3, [[1, 2]], {}, object()):
        for position in (0, 3, 5):
            inputs = list(good)
            inputs[position] = other
            refused(engine, tuple(inputs), DtypeError)
    mixed = [good[0], *map(torch.from_numpy, good[1:])]
    refused(engine, tuple(mixed), DtypeError)
    refused(engine, (torch.from_numpy(good[0]), *good[1:]), DtypeError)
    for count in range(8):
        if count != 6:
            refused(engine, tuple((good * 2)[:count]), ArgumentError)


DTYPES = st.sampled_from(["i1", "u1", "i4", "u4", "u8", "f4", "f8", "c8", "?", "O", ">i8", "M8[s]"])


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_arrays_are_served_or_refused(engine: PlanEngine, data: st.DataObject) -> None:
    """Shapes, dtypes, strides and values at random around what is right."""
    good = request(2, 7, 4)
    before = engine(*good)
    inputs = request(*(data.draw(st.integers(0, high)) for high in (8, 14, 6)))
    for _ in range(data.draw(st.integers(0, 3))):
        i = data.draw(st.integers(0, 5))
        array = inputs[i]
        match data.draw(st.sampled_from(["value", "dtype", "shape", "strides"])):
            case "value" if array.size and array.dtype == np.int64:
                at = data.draw(st.integers(0, array.size - 1))
                array = array.copy()
                array.reshape(-1)[at] = data.draw(st.integers(-(2**63), 2**63 - 1))
            case "dtype":
                array = np.zeros(array.shape, data.draw(DTYPES))
            case "shape":
                array = np.zeros(data.draw(st.lists(st.integers(0, 8), max_size=4)), np.int64)
            case "strides":
                array = np.repeat(array, 2, axis=0)[::2] if array.ndim else array
        inputs[i] = array
    try:
        scores = engine(*inputs)
    except FastrecError:
        pass
    else:
        assert scores.shape == inputs[4].shape
    np.testing.assert_array_equal(engine(*good), before)


class Dense(nn.Module):
    """A model with a float input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.layers(features) * weight


@pytest.fixture(scope="module")
def dense() -> Iterator[PlanEngine]:
    inputs = (torch.randn(3, 20), torch.randn(3, 1))
    with fastrec.compile(Dense().eval(), inputs, "native", 1, settings=SETTINGS) as made:
        assert isinstance(made, PlanEngine)
        yield made


@given(place=st.integers(0, 3 * 20 - 1), payload=st.integers(1, 2**22 - 1), negative=st.booleans())
@example(place=0, payload=1, negative=False)
@settings(max_examples=30, deadline=None)
def test_a_nan_is_refused_wherever_it_is(
    dense: PlanEngine, place: int, payload: int, negative: bool
) -> None:
    features, weight = np.ones((3, 20), np.float32), np.ones((3, 1), np.float32)
    before = dense(features, weight)
    bits = np.uint32(0x7F800000 | payload | (0x80000000 if negative else 0))
    features.reshape(-1).view(np.uint32)[place] = bits
    for inputs in ((features, weight), tuple(map(torch.from_numpy, (features, weight)))):
        assert dense._native(inputs, 1) is None
        with pytest.raises(
            ArgumentError, match="features: expected an input of numbers, got a NaN"
        ):
            dense(*inputs)
    features.reshape(-1)[place] = 1
    weight[1] = np.nan
    with pytest.raises(ArgumentError, match="weight: expected an input of numbers, got a NaN"):
        dense(features, weight)
    weight[1] = np.inf  # a number, as far as arithmetic goes
    assert np.isinf(dense(features, weight)[1]).any()
    weight[1] = 1
    np.testing.assert_array_equal(dense(features, weight), before)


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "8"])
def test_the_limit_itself(limit: Any) -> None:
    inputs = (torch.ones(2, 20), torch.ones(2, 1))
    with pytest.raises(ArgumentError, match="max_batch"):
        fastrec.compile(Dense().eval(), inputs, "native", settings={"max_batch": limit})


def test_the_limit_where_torch_runs_the_model() -> None:
    inputs = (torch.ones(2, 20), torch.ones(2, 1))
    settings = {"executor": "torch", "max_batch": 3}
    with fastrec.compile(Dense().eval(), inputs, "native", 1, settings=settings) as made:
        assert made(torch.ones(3, 20), torch.ones(3, 1)).shape == (3, 3)
        with pytest.raises(ShapeError, match=r"1\.\.3"):
            made(torch.ones(4, 20), torch.ones(4, 1))


@pytest.mark.parametrize("kind", ["numpy", "torch", "scores"])
def test_closing_while_others_call(kind: str) -> None:
    """Each call gives its scores, or says that the engine is closed."""
    rows = np.random.default_rng(0).standard_normal((3, 20), np.float32)
    inputs: tuple[Any, ...] = (rows, np.ones((3, 1), np.float32))
    if kind == "torch":
        inputs = tuple(map(torch.from_numpy, inputs))
    model = Dense().eval()
    examples = (torch.ones(2, 20), torch.ones(2, 1))
    for _ in range(5):
        engine = fastrec.compile(model, examples, "native", 1, settings=SETTINGS)
        expected = np.asarray(engine(*inputs))
        begun = threading.Barrier(5)

        def client(engine: Any = engine, begun: Any = begun) -> tuple[str, list[np.ndarray]]:
            found: list[np.ndarray] = []
            begun.wait()
            for _ in range(100_000):
                try:
                    if kind == "scores":
                        state = engine.encode(inputs[0], candidates=["weight"])
                        found.append(np.asarray(engine.score(state, inputs[1])))
                    else:
                        found.append(np.asarray(engine(*inputs)))
                except BackendError as error:
                    return str(error), found
                del found[:-3]
            raise AssertionError("the engine was never closed")

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            begun.wait()
            time.sleep(0.01)
            engine.close()
            for made in clients:
                message, found = made.result()
                assert "closed" in message
                for scores in found:
                    np.testing.assert_array_equal(scores, expected)

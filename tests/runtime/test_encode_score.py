"""A history encoded once, candidates scored many times: the bits of a whole call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastrec
from fastrec.errors import ArgumentError, BackendError, DtypeError, IdRangeError, ShapeError
from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower, program_spec
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.native.user_state import State, candidate_positions
from fastrec.spec import InputField, InputSpec

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=33, d=32, category_dim=8, ffn=48, tower=(40, 24)
)


def engine_of(model: nn.Module, *inputs: torch.Tensor, threads: int = 2) -> PlanEngine:
    spec = spec_of(model, inputs)
    plan = lower(model.eval(), inputs, spec)
    optimise(plan)
    return PlanEngine.build(
        plan,
        backend="native",
        precision="fp32",
        threads=threads,
        spec=program_spec(spec, plan, inputs),
        rows=[],
        versions={},
    )


def request(batch: int, length: int, candidates: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    sizes = {"B": batch, "L": length, "m": candidates}
    return spec_of(Ranker(CONFIG), ()).sample(sizes, seed=seed)


def build(int8: bool) -> PlanEngine:
    torch.manual_seed(1)
    model = Ranker(CONFIG).eval()
    inputs = tuple(map(torch.from_numpy, request(4, 33, 11)))
    if int8:
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    return engine_of(model, *inputs)


@pytest.fixture(scope="module", params=["float", "int8"])
def engine(request: pytest.FixtureRequest) -> PlanEngine:
    return build(request.param == "int8")


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


# The same bits.


@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 33),
    counts=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_the_bits_of_a_whole_call(
    engine: PlanEngine, batch: int, length: int, counts: list[int], seed: int
) -> None:
    inputs = request(batch, length, 1, seed)
    state = engine.encode(*inputs[:4])
    for i, count in enumerate(counts):
        candidates = request(batch, length, count, seed + i + 1)[4:]
        scores = engine.score(state, *candidates)
        assert scores.shape == (batch, count)
        np.testing.assert_array_equal(scores, engine(*inputs[:4], *candidates))


def test_empty_histories(engine: PlanEngine) -> None:
    inputs = list(request(3, 8, 5))
    inputs[3] = np.array([0, 8, 0])
    scores = engine.score(engine.encode(*inputs[:4]), *inputs[4:])
    np.testing.assert_array_equal(scores, engine(*inputs))


def test_the_encoder_is_left_out_of_scoring(engine: PlanEngine) -> None:
    state = engine.encode(*request(1, 33, 1)[:4])
    encode, score = (json.loads(text)["steps"] for text in state.parts.native.programs)
    modules = {step["module"] for step in score}
    assert not any(module.startswith("blocks.") for module in modules)
    assert "cross_attention.kv_proj" not in modules
    assert {"cross_attention.q_proj", "tower.0"} <= modules
    assert len(encode) + len(score) == len(engine.plan()["steps"])
    assert dict(state.sizes) == {"B": 1, "L": 33}
    # Keys and values of 33 events, and a few numbers.
    assert 33 * 2 * 32 * 4 <= state.nbytes < 33 * 2 * 32 * 4 + 64


def test_torch_in_torch_out(engine: PlanEngine) -> None:
    inputs = request(2, 9, 6)
    tensors = [torch.from_numpy(a) for a in inputs]
    expected = engine(*inputs)
    for state in (engine.encode(*inputs[:4]), engine.encode(*tensors[:4])):
        scores = engine.score(state, *tensors[4:])
        assert isinstance(scores, torch.Tensor)
        np.testing.assert_array_equal(scores.numpy(), expected)
        np.testing.assert_array_equal(engine.score(state, *inputs[4:]), expected)


def test_inputs_need_not_be_contiguous(engine: PlanEngine) -> None:
    inputs = request(2, 9, 6)
    strided = [np.repeat(a, 2, axis=0)[::2] for a in inputs]
    scores = engine.score(engine.encode(*strided[:4]), *strided[4:])
    np.testing.assert_array_equal(scores, engine(*inputs))


def test_many_threads_share_a_state(engine: PlanEngine) -> None:
    inputs = [request(2, 20, m, seed=m) for m in (1, 7, 30, 50)]
    states = [engine.encode(*r[:4]) for r in inputs[:2]]
    expected = {(s, r): engine(*inputs[s][:4], *inputs[r][4:]) for s in range(2) for r in range(4)}
    wrong: list[tuple[int, int]] = []

    def call(first: int) -> None:
        for i in range(first, first + 40):
            s, r = i % 2, i % 4
            state = engine.encode(*inputs[s][:4]) if i % 8 == 0 else states[s]
            if not np.array_equal(engine.score(state, *inputs[r][4:]), expected[s, r]):
                wrong.append((s, r))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_engine_is_split_once_by_many_threads() -> None:
    engine = build(False)
    history = request(1, 5, 1)[:4]
    found: list[State] = []
    threads = [
        threading.Thread(target=lambda: found.append(engine.encode(*history))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(state.parts) for state in found}) == 1


# The state.


def test_a_state_cannot_be_changed(engine: PlanEngine) -> None:
    history = [a.copy() for a in request(1, 5, 3)[:4]]
    candidates = request(1, 5, 3)[4:]
    state = engine.encode(*history)
    expected = engine.score(state, *candidates)
    with pytest.raises(ValueError, match="read-only"):
        state.arrays[0][...] = 0
    with pytest.raises(TypeError):
        state.sizes["B"] = 2  # type: ignore[index]
    with pytest.raises(AttributeError):
        state.arrays = ()  # type: ignore[misc]
    for array in history:
        array[...] = 0  # the caller's own again
    np.testing.assert_array_equal(engine.score(state, *candidates), expected)


def test_a_state_belongs_to_its_engine(engine: PlanEngine) -> None:
    inputs = request(1, 5, 3)
    other = build(False)
    with pytest.raises(ArgumentError, match="state: expected one that this engine encoded"):
        engine.score(other.encode(*inputs[:4]), *inputs[4:])
    with pytest.raises(DtypeError, match="state: expected what encode returned, got ndarray"):
        engine.score(inputs[0], *inputs[4:])


def test_a_state_belongs_to_its_batch(engine: PlanEngine) -> None:
    state = engine.encode(*request(2, 5, 1)[:4])
    with pytest.raises(ShapeError, match="cand_item: expected B = 2 at dimension 0, as in the"):
        engine.score(state, *request(3, 5, 4)[4:])


def test_a_closed_engine_says_so() -> None:
    engine, inputs = build(False), request(1, 5, 3)
    state = engine.encode(*inputs[:4])
    engine.close()
    for call in (lambda: engine.encode(*inputs[:4]), lambda: engine.score(state, *inputs[4:])):
        with pytest.raises(BackendError, match="this native engine is closed"):
            call()


# Bad input: refused before anything is computed, and the engine lives.


def test_bad_inputs_are_typed_errors(engine: PlanEngine) -> None:
    inputs = request(2, 9, 6)
    state = engine.encode(*inputs[:4])
    expected = engine.score(state, *inputs[4:])
    history, candidates = list(inputs[:4]), list(inputs[4:])

    def changed(values: list[Any], position: int, value: Any) -> list[Any]:
        return [value if i == position else v for i, v in enumerate(values)]

    encode = lambda values: engine.encode(*values)  # noqa: E731
    score = lambda values: engine.score(state, *values)  # noqa: E731
    for call, values, error, text in (
        (encode, inputs, ArgumentError, "inputs: expected 4 inputs"),
        (encode, [], ArgumentError, "inputs: expected 4 inputs"),
        (encode, changed(history, 3, np.array([1, 10])), IdRangeError, r"length: .* 0\.\.9"),
        (encode, changed(history, 0, history[0] + 300), IdRangeError, "item: "),
        (encode, changed(history, 1, history[1][:, :-1]), ShapeError, "category: "),
        (encode, changed(history, 0, [[1]]), DtypeError, "item: "),
        (score, inputs, ArgumentError, "inputs: expected 2 inputs"),
        (score, changed(candidates, 0, candidates[0].astype(np.int32)), DtypeError, "cand_item"),
        (score, changed(candidates, 0, -candidates[0] - 1), IdRangeError, "cand_item: "),
        (score, changed(candidates, 1, candidates[1][:, 0]), ShapeError, "cand_category: "),
        (score, changed(candidates, 1, torch.zeros(2, 6).long()), DtypeError, "cand_category"),
    ):
        with pytest.raises(error, match=text):
            call(values)  # type: ignore[no-untyped-call]
    np.testing.assert_array_equal(engine.score(state, *inputs[4:]), expected)


# Which inputs are the candidates'.


def test_candidates_by_name_or_position(engine: PlanEngine) -> None:
    inputs = request(1, 5, 3)
    expected = engine(*inputs)
    for candidates in (("cand_item", "cand_category"), (5, 4), ["cand_category", 4]):
        state = engine.encode(*inputs[:4], candidates=candidates)
        np.testing.assert_array_equal(engine.score(state, *inputs[4:]), expected)


def test_one_item_at_a_time(engine: PlanEngine) -> None:
    # Another split of the same plan: the categories are known before the items.
    inputs = request(2, 5, 3)
    state = engine.encode(*inputs[:4], inputs[5], candidates="cand_item")
    assert dict(state.sizes) == {"B": 2, "L": 5, "m": 3}
    np.testing.assert_array_equal(engine.score(state, inputs[4]), engine(*inputs))
    with pytest.raises(ShapeError, match="cand_item: expected m = 3"):
        engine.score(state, inputs[4][:, :2])


def test_a_range_that_the_history_decides(engine: PlanEngine) -> None:
    inputs = request(2, 9, 3)
    history = [inputs[i] for i in (0, 1, 2, 5)]
    state = engine.encode(*history, candidates=("length", "cand_item"))
    np.testing.assert_array_equal(engine.score(state, inputs[3], inputs[4]), engine(*inputs))
    with pytest.raises(IdRangeError, match=r"length: expected lengths in 0\.\.9"):
        engine.score(state, np.array([1, 10]), inputs[4])


@pytest.mark.parametrize("given", ["item_id", 6, -1, True, (0, 9), (), range(6)])
def test_unknown_candidates_are_refused(engine: PlanEngine, given: Any) -> None:
    with pytest.raises(ArgumentError, match="candidates: expected "):
        engine.encode(*request(1, 5, 1)[:4], candidates=given)


def test_a_spec_without_candidates_wants_to_be_told() -> None:
    spec = InputSpec((InputField("x", ("B", 3), "float32"), InputField("y", ("B",), "float32")))
    with pytest.raises(ArgumentError, match="no input has a dimension 'm'"):
        candidate_positions(spec)
    assert candidate_positions(spec, "y") == (1,)


# Plans that split, and plans that do not.


def checked(function: Callable[..., torch.Tensor], dims: int = 24) -> PlanEngine:
    generator = torch.Generator().manual_seed(dims)
    x, y = torch.randn(3, dims, generator=generator), torch.randn(3, dims, generator=generator)
    engine = engine_of(Lambda(function), x, y)
    state = engine.encode(x, candidates="y")
    assert torch.equal(engine.score(state, y), engine(x, y))
    return engine


def test_a_buffer_that_both_parts_fill() -> None:
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(0))

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.cat([torch.exp(x), torch.tanh(y)], -1), weight)

    engine = checked(model)
    state = engine.encode(torch.zeros(3, 24), candidates=["y"])
    assert state.nbytes == 3 * 24 * 4
    encode, score = (json.loads(text)["steps"] for text in state.parts.native.programs)
    assert [s["kind"] for s in encode] == ["map"]
    assert [s["kind"] for s in score] == ["map", "map", "linear"]


def test_a_part_of_a_shared_buffer_that_its_own_side_reads_again() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = torch.exp(x)
        return torch.cat([a, torch.tanh(y), torch.sigmoid(a * 3)], -1) * 2

    checked(model)


def test_a_norm_that_hands_on_two_results() -> None:
    norm = nn.LayerNorm(24)

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x + torch.relu(x)
        return norm(total) * y + total

    checked(model)


def test_an_input_handed_on_as_it_is() -> None:
    layer = nn.Linear(24, 24)
    engine = checked(lambda x, y: layer(x) * y + x)
    assert engine.encode(torch.zeros(3, 24), candidates="y").nbytes == 2 * 3 * 24 * 4


def test_a_history_that_is_computed_twice_over() -> None:
    first, second = nn.Linear(24, 24), nn.Linear(24, 24)
    checked(lambda x, y: torch.relu(second(torch.relu(first(x)))) * y)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, y: torch.exp(x * y), "every step that reads the history reads the candidates"),
        (lambda x, y: torch.exp(x), "do not depend on the candidates"),
        (lambda x, y: torch.exp(y) + torch.relu(y), "every step that reads the history"),
        (lambda x, y: torch.matmul(torch.ones(5, 5), torch.ones(5)) + y, "every step"),
    ],
)
def test_plans_that_do_not_split(function: Callable[..., torch.Tensor], why: str) -> None:
    x, y = torch.randn(2, 5), torch.randn(2, 5)
    engine = engine_of(Lambda(function), x, y)
    with pytest.raises(BackendError, match=f"does not split into encode and score: .*{why}"):
        engine.encode(x, candidates="y")
    torch.testing.assert_close(engine(x, y), function(x, y))


def test_engines_in_one_piece_say_so(request_of: Any, ranker: Ranker) -> None:
    inputs = request_of(1)
    with fastrec.compile(ranker, inputs, backend="torch") as engine:
        with pytest.raises(BackendError, match="this torch engine runs the model in one piece"):
            engine.encode(*inputs[:4])
        with pytest.raises(BackendError, match="encode and score need a native engine"):
            engine.score(None, *inputs[4:])

"""Files of plans of users' own models: masks, reductions, softmax; altered ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_file import VALUES, joined, leaves, split
from torch import nn

import fastrec
from fastrec.errors import ArtifactError, FastrecError
from fastrec.kernels._compiled import reason_missing
from fastrec.models.attention import KeyMask, SelfAttention
from fastrec.nn import GroupedLinear, SeparableProjection, WindowSparseAttention
from fastrec.runtime import load_engine
from fastrec.runtime.engine import Engine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

Inputs = list[torch.Tensor]


class EveryKind(nn.Module):
    """Each attention and reduction that has a kind of step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 257)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 5, 8] to [B, 1]."""
        causal = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        free = F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :1, :, :1].transpose(2, 3))
        padded = F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :1, None, :, 0] > -1)
        wide = self.wide(x)
        beyond = F.scaled_dot_product_attention(wide, wide, wide, is_causal=True)
        both = (causal + free + padded).softmax(-1)
        return both.amax((1, 2)).sum(-1, keepdim=True) + beyond.mean((1, 2, 3)).unsqueeze(-1)


def every_kind() -> tuple[nn.Module, Callable[[int], Inputs]]:
    generator = torch.Generator().manual_seed(5)
    return EveryKind(), lambda batch: [torch.randn(batch, 3, 5, 8, generator=generator)]


class FastrecLayers(nn.Module):
    """The layers of fastrec.nn and what goes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = GroupedLinear(8, 8, 2, shuffle=True)
        self.separable = SeparableProjection(8, 8, 3)
        pattern = fastrec.AttentionPattern(1, offsets=((3, 5), (4,)))
        self.attention = WindowSparseAttention(8, 2, pattern=pattern)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, 9, 8] and [B] to [B, 9, 9]."""
        hidden = self.separable(self.grouped(x), lengths=lengths)
        mixed = self.attention(hidden, lengths=lengths)[0]
        return mixed @ x.mT + (x.softmax(1) @ mixed.mT).cumsum(1)


def fastrec_layers() -> tuple[nn.Module, Callable[[int], Inputs]]:
    return FastrecLayers(), lambda batch: [
        torch.randn(batch, 9, 8, generator=torch.Generator().manual_seed(batch)),
        torch.tensor([9, 0, 4, 1, 2, 3, 5, 6][:batch]),
    ]


class InBytes(nn.Module):
    """Attention in 8-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(32, 2)
        self.windowed = WindowSparseAttention(32, 2, pattern=fastrec.AttentionPattern(2))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, 9, 32] and [B] to [B, 9, 32]."""
        mixed = self.attention(x, KeyMask(torch.zeros(x.shape[0], 1, 1, 9), lengths))
        return self.windowed(mixed, lengths=lengths)[0]


def in_bytes() -> tuple[nn.Module, Callable[[int], Inputs]]:
    def draw(batch: int) -> Inputs:
        _, lengths = fastrec_layers()[1](batch)
        return [torch.randn(batch, 9, 32, generator=torch.Generator().manual_seed(batch)), lengths]

    model = InBytes().eval()
    fastrec.quantize_(model, fastrec.Int8(attention=True), calibration=[draw(8)])
    return model, draw


def example(name: str, kind: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    from importlib import util

    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kind)(), module.example_inputs


MODELS = {
    "bst": lambda: example("plain_bst", "PlainBst"),
    "sasrec": lambda: example("plain_sasrec", "PlainSasrec"),
    "every kind": every_kind,
    "fastrec's layers": fastrec_layers,
    "in bytes": in_bytes,
}


@pytest.fixture(scope="module", params=MODELS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Path, Callable[[int], Inputs]]:
    torch.manual_seed(1)
    model, draw = MODELS[request.param]()
    engine = fastrec.compile(
        model.eval(), draw(4), backend="native", settings={"executor": "plan"}, threads=2
    )
    return engine, engine.save(tmp_path_factory.mktemp("engine") / "own.fastrec"), draw


def test_the_same_bits(saved: tuple[Engine, Path, Callable[[int], Inputs]]) -> None:
    engine, path, draw = saved
    with load_engine(path) as loaded:
        assert loaded.describe() == engine.describe()
        for batch in (1, 3, 8):
            inputs = draw(batch)
            assert torch.equal(loaded(*inputs), engine(*inputs))


def test_multiply_adds_are_known(saved: tuple[Engine, Path, Callable[[int], Inputs]]) -> None:
    engine, _, draw = saved
    for row in engine.profile(draw(2)):
        if "attention" in row["op"]:
            assert row["macs"] > 0
            assert "/" in row["kernel"]


def test_multiply_adds_of_each_kind() -> None:
    model, draw = every_kind()
    engine = fastrec.compile(model.eval(), draw(4), backend="native", settings={"executor": "plan"})
    rows = engine.profile(draw(2))
    macs = [row["macs"] for row in rows if row["op"] == "masked_attention"]
    assert macs == [2 * 2 * 3 * 8 * 25, 2 * 2 * 3 * 8 * 25, 2 * 2 * 3 * 257 * 15]
    assert [r["macs"] for r in rows if r["op"] == "causal_attention"] == [2 * 2 * 3 * 8 * 15]


def refused(path: Path, header: dict[str, Any], sections: bytes, match: str) -> None:
    path.write_bytes(joined(header, sections))
    with pytest.raises(ArtifactError, match=match):
        load_engine(path)


def test_operands_outside_their_buffers(
    saved: tuple[Engine, Path, Callable[[int], Inputs]], tmp_path: Path
) -> None:
    original, sections = split(saved[1].read_bytes())
    for step, row in enumerate(original["program"]["steps"]):
        for name, operand in row["operands"].items():
            views = range(len(operand)) if name == "x" and row["kind"] == "map" else [None]
            for index in views:
                header = json.loads(json.dumps(original))
                changed = header["program"]["steps"][step]["operands"][name]
                view = changed if index is None else changed[index]
                view[1] += 2**30  # the offset
                refused(tmp_path / "f", header, sections, "inside their buffers")


Change = Callable[[dict[str, Any]], None]


def field(name: str, value: Any) -> Change:
    def change(step: dict[str, Any]) -> None:
        assert name in step["fields"]
        step["fields"][name] = value

    return change


def distances(change_lists: Callable[[list[Any]], Any]) -> Change:
    def change(step: dict[str, Any]) -> None:
        change_lists(step["fields"]["distances"])

    return change


def no_field(name: str) -> Change:
    return lambda step: step["fields"].pop(name)


def without(operand: str) -> Change:
    return lambda step: step["operands"].pop(operand)


def size(operand: str, dim: int, value: int) -> Change:
    """A smaller size: inside its buffer, but another than the kernel goes by."""

    def change(step: dict[str, Any]) -> None:
        step["operands"][operand][2][dim] = [value]

    return change


def stride(operand: str, dim: int, value: int) -> Change:
    def change(step: dict[str, Any]) -> None:
        step["operands"][operand][3][dim] = [value]

    return change


def dims(operand: str, count: int) -> Change:
    """Another number of dimensions, each of size 1."""

    def change(step: dict[str, Any]) -> None:
        step["operands"][operand][2:4] = [[[1]] * count, [[1]] * count]

    return change


def fewer_keys(step: dict[str, Any]) -> None:
    for operand in ("k", "v"):
        size(operand, 2, 3)(step)


def smaller_result(step: dict[str, Any]) -> None:
    step["operands"]["y"][2] = [[1]] * len(step["operands"]["y"][2])


def causal_and_capped(step: dict[str, Any]) -> None:
    step["fields"].update(causal=True, caps=True)


WSA, WSA8 = "window_sparse_attention", "window_sparse_attention_int8"
ALTERED: list[tuple[str, Change, str]] = [
    (WSA8, no_field("distances"), "missing: distances"),
    (WSA8, field("causal", 2), "causal: expected true or false"),
    (WSA8, field("window", -1), "a window"),
    (WSA8, distances(lambda of: of.extend([[9], [9]])), "one list of distances"),
    (WSA8, distances(lambda of: of.clear()), "list of distances"),
    (WSA8, field("q_zero_point", 256), "zero points in"),
    (WSA8, field("y_zero_point", -1), "zero points in"),
    (WSA8, field("exponent_scale", -1.0), "0 or more"),
    (WSA8, field("v_scale", 1e39), "0 or more"),
    (WSA8, field("y_scale", 0.0), "above 0"),
    (WSA8, size("v", 2, 1), "keys like the queries"),
    (WSA8, size("lengths", 0, 1), "a length a sequence"),
    (WSA8, stride("k", 3, 0), "contiguous heads"),
    (WSA8, smaller_result, "a result"),
    ("quantize", field("zero_point", 256), "zero points in 0..255"),
    ("quantize", field("scale", 0.0), "scales above 0"),
    ("quantize", size("x", 0, 1), "contiguous|as many elements"),
    ("quantize", smaller_result, "as many elements"),
    ("causal_attention", without("v"), "without its operand v"),
    ("causal_attention", size("k", 2, 3), "keys like the queries"),
    ("causal_attention", fewer_keys, "as many keys as queries"),
    ("causal_attention", size("v", 3, 4), "keys like the queries"),
    ("causal_attention", stride("q", 3, 0), "contiguous heads"),
    ("causal_attention", smaller_result, "a result of the queries' size"),
    ("causal_attention", no_field("scale"), "missing: scale"),
    ("causal_attention", field("scale", float("inf")), "invalid JSON"),
    ("causal_attention", field("scale", "1"), "scale: expected a number"),
    ("masked_attention", field("causal", 2), "causal: expected true or false"),
    ("masked_attention", field("empty_is_nan", -1), "empty_is_nan: expected true or false"),
    ("masked_attention", causal_and_capped, "causal mask, or one that"),
    ("masked_attention", size("mask", 3, 2), "a number a score"),
    ("masked_attention", size("mask", 2, 2), "a number a score"),
    ("masked_attention", stride("mask", 3, 0), "contiguous rows of the mask"),
    ("masked_attention", stride("k", 3, 0), "contiguous heads"),
    ("masked_attention", size("q", 1, 2), "keys like the queries"),
    ("masked_attention", smaller_result, "a result of the queries' size"),
    ("reduce", field("operation", "product"), "sum, mean, max"),
    ("reduce", lambda s: s["fields"].update(more=0), "fields that a step does not have"),
    ("reduce", dims("x", 2), "three dim"),
    ("reduce", stride("x", 1, 0), "contiguous"),
    ("reduce", smaller_result, "a result of the outer sizes"),
    ("softmax", stride("x", 1, 0), "contiguous"),
    ("grouped_linear", field("shuffle", 2), "shuffle: expected true or false"),
    ("grouped_linear", size("x", 2, 4), "as many inputs|contiguous"),
    ("grouped_linear", size("weight", 0, 1), "as many inputs"),
    ("grouped_linear", size("weight", 1, 2), "contiguous"),
    ("grouped_linear", stride("weight", 2, 0), "contiguous"),
    ("grouped_linear", smaller_result, "results of the operands' size"),
    ("separable_projection", field("before", 3), "taps"),
    ("separable_projection", field("before", -1), "taps"),
    ("separable_projection", size("depthwise", 1, 2), "31 taps|contiguous"),
    ("separable_projection", size("pointwise", 2, 4), "as many inputs"),
    ("separable_projection", size("lengths", 0, 1), "a length a sequence"),
    ("separable_projection", stride("x", 2, 0), "contiguous channels"),
    ("separable_projection", smaller_result, "results of the operands' size"),
    (WSA, no_field("window"), "missing: window"),
    (WSA, field("causal", 7), "causal: expected true or false"),
    (WSA, field("window", -1), "a window"),
    (WSA, field("window", 3), "rise beyond the window"),
    (WSA, field("window", 2**70), "64 bits"),
    (WSA, distances(lambda of: of.append([9])), "one list of distances"),
    (WSA, distances(lambda of: of[0].insert(0, -1)), "rise beyond the window"),
    (WSA, distances(lambda of: of[0].append(3)), "rise beyond the window"),
    (WSA, distances(lambda of: of[0].append(2**40)), "rise beyond the window"),
    (WSA, fewer_keys, "as many keys as queries"),
    (WSA, size("lengths", 0, 1), "a length a sequence"),
    (WSA, stride("k", 3, 0), "contiguous heads"),
    (WSA, smaller_result, "a result of the queries' size"),
    ("matmul", field("transposed", 2), "transposed: expected true or false"),
    ("matmul", size("a", 1, 3), "rows of a by columns of b"),
    ("matmul", size("a", 2, 3), "columns of a for the rows of b"),
    ("matmul", size("b", 0, 1), "as many matrices"),
    ("matmul", stride("a", 2, 0), "contiguous rows of a"),
    ("matmul", stride("b", 1, 0), "contiguous matrices of b"),
    ("matmul", stride("b", 2, 0), "contiguous matrices of b"),
    ("matmul", smaller_result, "rows of a by columns of b"),
    ("cumsum", stride("x", 1, 0), "contiguous"),
    ("cumsum", smaller_result, "a result of the operand's size"),
    ("softmax", dims("x", 0), "rows of numbers"),
    ("softmax", smaller_result, "a result of the operand's size"),
    (
        "softmax",
        lambda s: s["operands"].update(z=s["operands"]["x"]),
        "softmax with an operand that it does not have",
    ),
    ("softmax", lambda s: s.update(kind="warp"), "warp"),
]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Files that have a step of each kind."""
    torch.manual_seed(1)
    found = []
    for model, draw in (every_kind(), fastrec_layers(), in_bytes()):
        engine = fastrec.compile(
            model.eval(), draw(4), backend="native", settings={"executor": "plan"}
        )
        found.append(engine.save(tmp_path_factory.mktemp("engine") / "e").read_bytes())
    return found


@pytest.mark.parametrize(("kind", "change", "match"), ALTERED)
def test_altered_steps(
    contents: list[bytes], tmp_path: Path, kind: str, change: Any, match: str
) -> None:
    for content in contents:
        header, sections = split(content)
        for step in header["program"]["steps"]:
            if step["kind"] == kind and (kind != "masked_attention" or "mask" in step["operands"]):
                change(step)
                return refused(tmp_path / "f", header, sections, match)
    raise AssertionError(f"no step of kind {kind}")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_hostile_plan(
    saved: tuple[Engine, Path, Callable[[int], Inputs]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    _, good, draw = saved
    header, sections = split(good.read_bytes())
    steps = header["program"]["steps"]
    wanted = {kind for kind, _, _ in ALTERED}
    places = [
        ("steps", i, *p) for i, s in enumerate(steps) if s["kind"] in wanted for p in leaves(s)
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places))
        value: Any = header["program"]
        try:
            for key in way:
                value = value[key]
            value[last] = data.draw(VALUES)
        except (TypeError, IndexError, KeyError):  # changed away
            continue
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(joined(header, sections))
    try:
        engine = load_engine(path)
        for batch in (1, 3):
            result = engine(*draw(batch))
            assert isinstance(result, torch.Tensor)
            assert np.prod(result.shape) >= 0
    except (FastrecError, MemoryError):
        pass

"""Reading through copies: the same numbers, and no copy left that torch's layouts asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Buffer, Extent
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.native.passes.remove_copies import remove_copies, through
from fastrec.runtime.native.program import Program

compiled = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def cut(draw: Any, view: Any) -> Any:
    """Some of each dimension, in another order."""
    for dim, size in enumerate(view.shape):
        start = draw(st.integers(0, size.coefficient - 1))
        left = draw(st.integers(1, size.coefficient - start))
        view = view.sliced(dim, start, Extent(left))
    return view.permuted(draw(st.permutations(range(len(view.shape)))))


@given(data=st.data(), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_what_is_read_through_is_what_the_copy_holds(data: Any, sizes: list[int]) -> None:
    numbers = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    shape = tuple(map(Extent, sizes))
    source = cut(data.draw, Buffer("float32", shape, "constant", data=numbers).view())
    copied = np.ascontiguousarray(source.constant)
    copy = Buffer("float32", source.shape, "constant", data=copied)
    # Read with dimensions split and merged, then cut.
    split = []
    for size in source.shape:
        parts = [p for p in range(1, size.coefficient + 1) if size.coefficient % p == 0]
        part = data.draw(st.sampled_from(parts))
        split += [Extent(part), Extent(size.coefficient // part)]
    read = copy.view()
    if data.draw(st.booleans()):
        read = read.reshaped(tuple(split))
    if data.draw(st.booleans()):
        read = read.reshaped((Extent(copied.size),))
    assert read is not None
    read = cut(data.draw, read)
    found = through(read, source)
    if found is not None:
        np.testing.assert_array_equal(found.constant, read.constant)
    elif read.is_contiguous and read.shape == source.shape:
        raise AssertionError("the whole copy can always be read in the original")


def test_free_sizes() -> None:
    """The heads of a projection that was moved to the front of the batch, and back."""
    batch, length = Extent.of("B"), Extent.of("L")
    source = Buffer("float32", (batch, length, Extent(96))).view().permuted((1, 0, 2))
    copy = Buffer("float32", source.shape).view()
    heads = copy.reshaped((length, batch, Extent(12), Extent(8)))
    assert heads is not None
    found = through(heads.permuted((1, 2, 0, 3)), source)
    assert found is not None
    assert [str(s) for s in found.strides] == ["96*L", "8", "96", "1"]
    # Sequence and batch as one dimension is nothing that strides can say there.
    merged = copy.reshaped((length * batch, Extent(96)))
    assert merged is not None
    assert through(merged, source) is None
    # A slice of a free size may lie beyond it.
    tail = copy.sliced(2, 90, Extent(6))
    assert tail is not None
    found = through(tail, source)
    assert found is not None
    assert found.offset == 90


def test_a_copy_that_is_the_result_or_another_dtype_stays() -> None:
    x = Buffer("bool", (Extent(4),), "input")
    cast, out = Buffer("int64", (Extent(4),)), Buffer("float32", (Extent(4),))
    read = steps.map(x=[cast.view()], y=out.view(), program=[("to_f32", 0)])
    copy = steps.map(x=[x.view()], y=cast.view(), program=[])
    plan = Program((), [x], [copy, read], [out.view()])
    remove_copies(plan)
    assert read.inputs[0].buffer is cast


def plan_of(model: nn.Module, *inputs: torch.Tensor) -> Program:
    plan = lower(model.eval(), inputs, spec_of(model, inputs))
    optimise(plan)
    return plan


def agrees(model: nn.Module, *inputs: torch.Tensor) -> Program:
    spec, plan = spec_of(model, inputs), plan_of(model, *inputs)
    engine = PlanEngine.build(
        plan, backend="native", precision="fp32", threads=2, spec=spec, rows=[], versions={}
    )
    for batch in range(1, 9):
        some = [torch.cat([x] * 8)[:batch] * (0.5 if x.is_floating_point() else 1) for x in inputs]
        with torch.inference_mode():
            expected = model(*some)
        torch.testing.assert_close(engine(*some), expected, rtol=2e-5, atol=2e-5)
    return plan


class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=ids == 0)


def ids_of(batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(1, 9, (batch, length), generator=torch.Generator().manual_seed(3))
    ids[0, : length // 2] = 0  # in front
    ids[1, length // 2 :] = 0  # behind
    ids[2, 1:-1:2] = 0  # between
    return ids


@compiled
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("length", [5, 17])
def test_an_encoder_needs_no_copy(norm_first: bool, length: int) -> None:
    torch.manual_seed(4)
    plan = agrees(Encoder(norm_first), torch.randn(4, length, 16), ids_of(4, length))
    assert not [s for s in plan.steps if s.is_copy]
    kinds = [s.kind for s in plan.steps]
    assert kinds.count("masked_attention") == 2
    # The mask's heads and queries are broadcast: the kernel sees that it hides keys.
    for step in plan.steps:
        if step.kind == "masked_attention":
            assert [step.mask.strides[d].number for d in (1, 2)] == [0, 0]


class Masked(nn.Module):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x + 1, x * 2, attn_mask=self.mask(x, lengths))


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[2])


PADDINGS = {
    "behind": lambda x, n: (positions(x) < n[:, None])[:, None, None],
    "in front": lambda x, n: (positions(x) >= n[:, None])[:, None, None],
    "float": lambda x, n: torch.where(positions(x) < n[:, None], 0.0, float("-inf"))[:, None, None],
    "a finite number": lambda x, n: ((positions(x) >= n[:, None]) * -1e9)[:, None, None],
    "a head each": lambda x, n: (positions(x) < n[:, None])[:, None, None].expand(-1, 3, -1, -1),
    "queries too": lambda x, n: (
        (positions(x) < n[:, None])[:, None, None] & (positions(x) < n[:, None])[:, None, :, None]
    ),
    "causal too": lambda x, n: (
        (positions(x) < n[:, None])[:, None, None]
        & (positions(x)[None] <= positions(x)[:, None])[None, None]
    ),
}


@compiled
@pytest.mark.parametrize("name", PADDINGS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_padding(name: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(4, 3, length, 8, generator=generator)
    lengths = torch.tensor([0, length, length // 2, length - 1])
    agrees(Masked(PADDINGS[name]), x, lengths)


@compiled
def test_padded_keys_are_not_read() -> None:
    """As with lengths, what the mask hides at either end may be anything."""

    class Values(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            mask = (torch.arange(y.shape[2]) < n[:, None])[:, None, None]
            return F.scaled_dot_product_attention(x, y, y, attn_mask=mask)

    model, x = Values(), torch.randn(2, 1, 5, 8)
    y, n = torch.randn(2, 1, 20, 8), torch.tensor([3, 9])
    spec, plan = spec_of(model, (x, y, n)), plan_of(model, x, y, n)
    engine = PlanEngine.build(
        plan, backend="native", precision="fp32", threads=1, spec=spec, rows=[], versions={}
    )
    expected = engine(x, y, n)
    y[0, :, 3:], y[1, :, 9:] = float("inf"), float("inf")  # times 0 it is a NaN
    assert torch.equal(engine(x, y, n), expected)

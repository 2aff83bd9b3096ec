"""``SeparableProjection`` against ``conv1d`` and ``linear``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_checks import close, keeps_the_promises, same_gradients
from torch import nn
from torch.nn import functional as F

from fastrec.errors import ArgumentError, ShapeError
from fastrec.nn import GroupedLinear, SeparableProjection


def expected_of(module: SeparableProjection, x: torch.Tensor) -> torch.Tensor:
    width = module.kernel_size
    before = width - 1 if module.causal else width // 2
    padded = F.pad(x, (0, 0, before, width - 1 - before)).transpose(1, 2)
    kernel = module.depthwise[:, None]
    hidden = F.conv1d(padded, kernel, groups=module.in_features).transpose(1, 2)
    y = torch.cat(
        [
            F.linear(part, weight)
            for part, weight in zip(hidden.chunk(module.groups, -1), module.pointwise, strict=True)
        ],
        -1,
    )
    return y if module.bias is None else y + module.bias


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 17),
    outputs=st.integers(1, 17),
    width=st.sampled_from([1, 2, 3, 5, 8]),
    causal=st.booleans(),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_torch(
    batch: int,
    length: int,
    groups: int,
    inputs: int,
    outputs: int,
    width: int,
    causal: bool,
    bias: bool,
) -> None:
    width += width % 2 == 0 and not causal
    module = SeparableProjection(groups * inputs, groups * outputs, width, groups, bias, causal)
    x = torch.randn(batch, length, groups * inputs)
    terms = width * (inputs + outputs)
    same_gradients(module, lambda x: expected_of(module, x), x, list(module.parameters()), terms)


@pytest.mark.parametrize("causal", [False, True])
def test_from_float_starts_as_the_layer(causal: bool) -> None:
    linear = nn.Linear(24, 40)
    module = SeparableProjection.from_float(linear, 5, causal=causal)
    x = torch.randn(2, 11, 24)
    close(module(x), linear(x), 24)
    grouped = SeparableProjection.from_float(linear, 3, groups=4, causal=causal)
    close(grouped(x), GroupedLinear.from_float(linear, 4)(x), 24)


def test_rows_beyond_the_lengths_are_not_read() -> None:
    module = SeparableProjection(8, 6)
    x = torch.randn(2, 5, 8)
    x[1, 3:] = torch.nan
    y = module(x, torch.tensor([5, 3]))
    close(y[1:, :3], module(x[1:, :3]), 24)
    assert not y[1, 3:].any()


def test_keeps_the_promises() -> None:
    keeps_the_promises(SeparableProjection(32, 48, 3, 2).eval(), torch.randn(3, 9, 32))


def test_constructor_in_torchs_style() -> None:
    module = SeparableProjection(8, 12, bias=False, dtype=torch.float64)
    assert module.bias is None
    assert module.depthwise.dtype is torch.float64
    assert module(torch.zeros(5, 8, dtype=torch.float64)).shape == (5, 12)
    assert SeparableProjection(8, 12, device="meta").pointwise.is_meta
    assert "kernel_size=3, groups=1, bias=False, causal=False" in repr(module)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="kernel_size: expected 1 to 31, odd unless causal"):
        SeparableProjection(8, 8, 4)
    with pytest.raises(ArgumentError, match="kernel_size: expected 1 to 31, got 33"):
        SeparableProjection(8, 8, 33, causal=True)
    with pytest.raises(ArgumentError, match="groups: expected a divisor"):
        SeparableProjection(8, 8, groups=3)
    module = SeparableProjection(8, 8)
    with pytest.raises(ShapeError, match="x: expected shape"):
        module(torch.zeros(1, 2, 3, 8))
    with pytest.raises(ShapeError, match="x: expected shape"):
        module(torch.zeros(2, 8), torch.tensor([1]))
    with pytest.raises(ArgumentError, match="lengths: expected values in"):
        module(torch.zeros(1, 2, 8), torch.tensor([3]))

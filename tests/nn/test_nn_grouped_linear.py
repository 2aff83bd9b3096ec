"""``GroupedLinear`` against the dense layer with the same blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_checks import close, keeps_the_promises, same_gradients
from torch import nn
from torch.nn import functional as F

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.nn import GroupedLinear


def expected_of(module: GroupedLinear, x: torch.Tensor) -> torch.Tensor:
    """By ``nn.functional.linear`` a group."""
    parts = x.chunk(module.groups, -1)
    outs = [F.linear(part, weight) for part, weight in zip(parts, module.weight, strict=True)]
    y = torch.cat(outs, -1)
    if module.bias is not None:
        y = y + module.bias
    if module.shuffle:
        y = y.unflatten(-1, (module.groups, -1)).transpose(-1, -2).flatten(-2)
    return y


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 5),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    lead=st.lists(st.integers(0, 7), max_size=3),
    bias=st.booleans(),
    shuffle=st.booleans(),
)
def test_values_and_gradients_are_those_of_torch(
    groups: int, inputs: int, outputs: int, lead: list[int], bias: bool, shuffle: bool
) -> None:
    module = GroupedLinear(groups * inputs, groups * outputs, groups, bias, shuffle)
    x = torch.randn(*lead, groups * inputs)
    same_gradients(
        module, lambda x: expected_of(module, x), x, list(module.parameters()), inputs + outputs
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_from_float_keeps_the_blocks_and_each_output_its_place(groups: int, shuffle: bool) -> None:
    linear = nn.Linear(24, 40)
    module = GroupedLinear.from_float(linear, groups, shuffle=shuffle)
    output, channel = torch.arange(40)[:, None], torch.arange(24)[None, :]
    group = output % groups if shuffle else output // (40 // groups)
    kept = torch.where(channel // (24 // groups) == group, linear.weight, 0.0)
    x = torch.randn(7, 24)
    close(module(x), F.linear(x, kept, linear.bias), 24)
    if groups == 1:
        close(module(x), linear(x), 24)


@pytest.mark.parametrize("shuffle", [False, True])
def test_keeps_the_promises(shuffle: bool) -> None:
    keeps_the_promises(GroupedLinear(32, 48, 4, shuffle=shuffle).eval(), torch.randn(3, 9, 32))


def test_constructor_in_torchs_style() -> None:
    module = GroupedLinear(8, 12, 4, bias=False, dtype=torch.bfloat16)
    assert module.bias is None
    assert module.weight.dtype is torch.bfloat16
    assert module(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert GroupedLinear(8, 12, 4, device="meta").weight.is_meta
    shown = "in_features=8, out_features=12, groups=4, bias=False, shuffle=False"
    assert shown in repr(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 12, 3), "groups: expected a divisor of in_features = 8 and out_features = 12, got 3"),
        ((8, 12, 0), "groups: expected a positive integer, got 0"),
        ((0, 12, 1), "in_features: expected a positive integer, got 0"),
        ((8, True, 1), "out_features: expected a positive integer, got True"),
    ],
)
def test_bad_sizes(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GroupedLinear(*arguments)


def test_bad_input() -> None:
    module = GroupedLinear(8, 12, 4)
    with pytest.raises(ShapeError, match="x: expected shape"):
        module(torch.zeros(2, 9))
    with pytest.raises(DtypeError, match="weight: expected x's dtype"):
        module(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(DtypeError, match=r"linear: expected a torch.nn.Linear, got Conv1d"):
        GroupedLinear.from_float(nn.Conv1d(4, 4, 1), 2)  # type: ignore[arg-type]
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="linear: expected finite weights"):
        GroupedLinear.from_float(linear, 2)

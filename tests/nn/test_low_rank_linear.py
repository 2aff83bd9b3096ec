"""``LowRankLinear`` against the layer it replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_checks import close, keeps_the_promises, same_gradients
from torch import nn
from torch.nn import functional as F

import fastrec
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import LowRankLinear, SparseInt8Linear


@settings(max_examples=40, deadline=None)
@given(inputs=st.integers(1, 30), outputs=st.integers(1, 30), bias=st.booleans(), data=st.data())
def test_values_and_gradients_are_those_of_torch(
    inputs: int, outputs: int, bias: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    module = LowRankLinear(inputs, outputs, rank, bias)

    def expected_of(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, module.up.weight @ module.down.weight, module.up.bias)

    x = torch.randn(2, 5, inputs)
    same_gradients(module, expected_of, x, list(module.parameters()), inputs + rank + outputs)


def test_full_rank_is_exact_and_less_is_the_best() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 16)
    x = torch.randn(7, 24)
    close(LowRankLinear.from_float(linear, 16)(x), linear(x), 24)
    module = LowRankLinear.from_float(linear, 5)
    with torch.no_grad():
        error = torch.linalg.matrix_norm(linear.weight - module.up.weight @ module.down.weight)
        left_out = torch.linalg.svdvals(linear.weight)[5:].norm()
    assert float(error) == pytest.approx(float(left_out), rel=1e-5)


def test_a_weight_of_low_rank_is_found() -> None:
    linear = nn.Linear(24, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 24))
    x = torch.randn(7, 24)
    close(LowRankLinear.from_float(linear, 3)(x), linear(x), 24)


def test_keeps_the_promises() -> None:
    keeps_the_promises(LowRankLinear(32, 48, 8).eval(), torch.randn(3, 9, 32))


def test_compression_treats_its_layers_as_usual() -> None:
    model = nn.Sequential(LowRankLinear(64, 64, 32))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[torch.randn(16, 64)])
    assert isinstance(model[0].down, SparseInt8Linear)
    assert isinstance(model[0].up, SparseInt8Linear)
    assert model(torch.randn(3, 64)).shape == (3, 64)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"rank: expected at most .* = 8, got 9"):
        LowRankLinear(8, 12, 9)
    with pytest.raises(ArgumentError, match="rank: expected a positive integer"):
        LowRankLinear(8, 12, 0)
    with pytest.raises(DtypeError, match=r"linear: expected a torch\.nn\.Linear"):
        LowRankLinear.from_float(nn.Identity(), 2)  # type: ignore[arg-type]
    assert LowRankLinear(8, 12, 4, device="meta").up.weight.is_meta
    assert "in_features=8, out_features=12, rank=4" in repr(LowRankLinear(8, 12, 4))

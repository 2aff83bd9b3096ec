"""``fastrec.nn.PointwiseConv`` against torch's convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.nn import PointwiseConv


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7), (5, 7), (1, 5, 1), (0, 5, 4)])
def test_one_dimension_is_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(5, 4, 1, bias=bias)
    x = torch.randn(shape)
    torch.testing.assert_close(PointwiseConv.from_float(conv)(x), conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (5, 1, 6)])
def test_two_dimensions_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 1, padding="same")
    x = torch.randn(shape)
    torch.testing.assert_close(PointwiseConv.from_float(conv)(x), conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 4, 3),
        nn.Conv1d(4, 4, 1, stride=2),
        nn.Conv1d(4, 4, 1, padding=1),
        nn.Conv1d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, (1, 2)),
    ],
)
def test_other_convolutions_are_refused(conv: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="kernel 1"):
        PointwiseConv.from_float(conv)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(DtypeError, match="Conv1d"):
        PointwiseConv.from_float(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="dims: expected 1 or 2"):
        PointwiseConv(2, 2, dims=3)
    for shape in ((2, 3, 4), (4,), (1, 2, 4, 4)):
        with pytest.raises(ShapeError, match="input: expected"):
            PointwiseConv(4, 2)(torch.zeros(shape))

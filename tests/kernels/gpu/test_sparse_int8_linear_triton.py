"""``sparse_int8_linear``'s Triton kernel against the reference: interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from fastrec import env
from fastrec.kernels import sparse_int8_linear
from fastrec.kernels._compiled import Signature
from fastrec.kernels._registry import Sample
from fastrec.kernels.sparse_int8_linear import SPEC, triton_can_run
from fastrec.kernels.sparse_int8_linear._config import TritonConfig
from fastrec.kernels.sparse_int8_linear.samples import compare, sample

DEVICE = "cpu" if env.triton_interpret() else "cuda"
WHY_NOT = triton_can_run(Signature(DEVICE))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")
# The interpreter takes some milliseconds a program.
SMALL = [case for case in SPEC.samples() if case.macs <= 40_000]


@runs
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contract_samples(case: Sample) -> None:
    (x, packed), kwargs = case.make()
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    y = sparse_int8_linear(x.to(DEVICE), packed.to(DEVICE), **there, backend="triton")
    compare(y.cpu(), (x, packed), kwargs)


@runs
@pytest.mark.parametrize("splits", [1, 2, 3, 16])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_split_sums_are_the_same_bits(density: float, splits: int) -> None:
    from fastrec.kernels.sparse_int8_linear import _gpu, _triton

    case = sample(5, 40, 600, density=density, activation="relu", out="uint8")
    (x, packed), kwargs = case.make()
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    weight = _gpu.prepare(packed.to(DEVICE), **there)
    y = torch.full((5, 40), 77, dtype=torch.uint8, device=DEVICE)
    _triton.run(weight, x.to(DEVICE), y, TritonConfig(16, 4, splits, 4, 3))
    compare(y.cpu(), (x, packed), kwargs)


@runs
def test_leading_dimensions_and_strides() -> None:
    (x, packed), kwargs = sample(12, 33, 36, bias=False).make()
    wide = torch.nn.functional.pad(x, (0, 4)).to(DEVICE)[:, :-4].view(3, 4, 36)
    y = sparse_int8_linear(wide, packed.to(DEVICE), **kwargs, backend="triton")
    assert y.shape == (3, 4, 33)
    compare(y.reshape(12, 33).cpu(), (x, packed), kwargs)

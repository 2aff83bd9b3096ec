"""Cases shared by the contract tests and the bench."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.pointwise_attention.samples import samples as float_samples
from fastrec.kernels.pointwise_attention_int8.reference import pointwise_attention_int8_reference

STEP = 1 / 40


def rounded(x: torch.Tensor) -> torch.Tensor:
    """int8 numbers of about unit variance in steps of 1 / 40; -128 among them."""
    return (x.nan_to_num(-128.0) / STEP).round().clamp(-128, 127).to(torch.int8)


def samples() -> Sequence[Sample]:
    """The float op's float32 cases, rounded."""

    def of(case: Sample) -> Sample:
        def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, kwargs = case.make()
            kwargs |= {"q_scale": STEP, "k_scale": STEP, "v_scale": STEP}
            return tuple(rounded(x) for x in args), kwargs

        return dataclasses.replace(case, make=make, bytes_moved=case.bytes_moved * 5 // 8)

    return [of(case) for case in float_samples() if "float32" in case.name]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Equal to the last bit: scores and sums are integers, floats single IEEE steps."""
    exact = pointwise_attention_int8_reference(*args, **kwargs)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    different = (actual != exact).sum().item()
    assert different == 0, f"{different} of {exact.numel()} elements differ"

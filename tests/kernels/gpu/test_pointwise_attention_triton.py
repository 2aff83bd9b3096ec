"""``pointwise_attention``'s Triton kernels against the reference: interpreted, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrec import env
from fastrec.errors import ArgumentError, BackendError
from fastrec.kernels import pointwise_attention
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Sample
from fastrec.kernels.pointwise_attention import SPEC, log_time_edges

DEVICE = "cpu" if env.triton_interpret() else "cuda"
WHY_NOT = triton_can_run(Signature(DEVICE))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")
TABLES = ("position_bias", "time_bias")
# The interpreter takes some hundred milliseconds a case.
CASES = [case for case in SPEC.samples() if case.macs <= 120_000 and not case.bench]
LEARNED = [case for case in CASES if "P20" in case.name or "targets" in case.name][::3]


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def on_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return [*map(there, args)], {name: there(value) for name, value in kwargs.items()}


@runs
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract_samples(case: Sample) -> None:
    args, kwargs = case.make()
    inputs, options = on_device(args, kwargs)
    out = pointwise_attention(*inputs, **options, backend="triton")
    SPEC.compare(out.cpu(), args, kwargs)


def gradients(args: Any, kwargs: dict[str, Any], d_out: torch.Tensor, backend: str) -> list[Any]:
    names = [name for name in TABLES if name in kwargs]
    leaves = [x.detach().requires_grad_() for x in (*args, *(kwargs[name] for name in names))]
    tables = dict(zip(names, leaves[3:], strict=True))
    out = pointwise_attention(*leaves[:3], **kwargs | tables, backend=backend)
    return list(torch.autograd.grad(out, leaves, d_out.to(out), materialize_grads=True))


@runs
@pytest.mark.parametrize("case", LEARNED, ids=lambda case: case.name)
def test_gradients(case: Sample) -> None:
    """Against fp64. A sum of n terms of size s is off by at most n (n + 2 D + 20) roundings of s;
    16-bit weights and slopes are rounded before they are multiplied, and results after."""
    args, kwargs = case.make()
    d_out = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(1))
    d_out = d_out.to(args[0].dtype)
    doubles = [x.double() for x in args]
    wide = kwargs | {name: kwargs[name].double() for name in TABLES if name in kwargs}
    exact = gradients(doubles, wide, d_out.double(), "reference")
    inputs, options = on_device(args, kwargs)
    got = gradients(inputs, options, there(d_out), "triton")
    rounding = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    step = rounding[args[0].dtype]
    for x, expected in zip(got, exact, strict=True):
        assert x.shape == expected.shape
        if not x.numel():
            continue
        size = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(x.cpu().double(), expected, rtol=8 * step, atol=8 * step * size)


@runs
def test_buckets_are_the_references() -> None:
    """Differences at each edge and next to it, with a table that tells its entries apart."""
    edges = log_time_edges(129)[::4].contiguous()
    near = torch.cat([edges - 1, edges, edges + 1, torch.tensor([0, 2**62])])
    length = len(near)
    q = torch.zeros(1, 1, length, 1)
    args = (q, q, torch.ones(1, 1, length, 1))
    kwargs: dict[str, Any] = {
        "time_bias": 100.0 + torch.arange(len(edges) + 1.0),
        "time_edges": edges,
        "timestamps": torch.zeros(1, length, dtype=torch.int64),
        "query_timestamps": near[None],
        "norm_length": 1,
        "targets": length - 1,
    }
    inputs, options = on_device(args, kwargs)
    out = pointwise_attention(*inputs, **options, backend="triton")
    # SiLU of numbers so large is the number: sums of two integers.
    assert torch.equal(out.cpu().double(), SPEC.reference(*args, **kwargs).round())


@runs
def test_bad_values() -> None:
    """On a CPU an error; a GPU does not wait for one, and reads nothing that is not there."""
    q, k, v = map(there, torch.randn(3, 2, 1, 20, 8))
    wrong = there(torch.tensor([20, 99]))
    for name in ("lengths", "targets"):
        if DEVICE == "cpu":
            with pytest.raises(ArgumentError, match=f"{name}: .* got 99 at 1"):
                pointwise_attention(q, k, v, **{name: wrong}, backend="triton")
        else:
            out = pointwise_attention(q, k, v, **{name: wrong})
            right = wrong.clamp(max=20)
            assert torch.equal(out, pointwise_attention(q, k, v, **{name: right}))


def test_doubles_are_for_the_reference() -> None:
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match="float32, bfloat16, float16, the input is float64"):
        pointwise_attention(x, x, x, backend="triton")

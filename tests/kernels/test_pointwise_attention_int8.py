"""``pointwise_attention_int8``: exact integers, closeness to the float op, bad input, and fuzz."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels import pointwise_attention, pointwise_attention_int8
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.pointwise_attention import log_time_edges
from fastrec.kernels.pointwise_attention_int8 import SPEC
from fastrec.kernels.pointwise_attention_int8.reference import silu

SCALES = {"q_scale": 0.02, "k_scale": 0.03, "v_scale": 0.01}


def own_kernels() -> list[str]:
    """The instruction sets that have a kernel of their own here."""
    if reason_missing():
        return ["none"]
    isas = []
    for isa in kernels.available_isas():
        with kernels.force_isa(isa):
            isas += [isa] * (SPEC.kernel_isa() == isa)
    return isas


ISAS = own_kernels()
compiled_only = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def bytes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@compiled_only
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    length=st.integers(0, 150),
    dims=st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 32, 64, 70]),
    value_dims=st.sampled_from([1, 7, 8, 9, 33, 64]),
    causal=st.booleans(),
    tables=st.booleans(),
    jagged=st.booleans(),
    isa=st.sampled_from(ISAS),
    data=st.data(),
)
def test_any_call_is_the_reference_to_the_last_bit(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    value_dims: int,
    causal: bool,
    tables: bool,
    jagged: bool,
    isa: str,
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    scale = data.draw(st.sampled_from([1e-6, 0.02, 40.0]))
    kwargs: dict[str, Any] = SCALES | {"q_scale": scale, "causal": causal}
    kwargs["targets"] = torch.tensor([data.draw(st.integers(0, n)) for n in sizes]).long()
    rows = (sum(sizes),) if jagged else (batch, length)
    if jagged:
        kwargs |= {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0), "norm_length": 50}
        args = [bytes_of(*rows, heads, d, seed=d) for d in (dims, dims + 1, value_dims)]
        args[1] = args[1][..., 1:]  # strided
    else:
        kwargs["lengths"] = torch.tensor(sizes).long()
        args = [bytes_of(batch, heads, length, d, seed=d) for d in (dims, dims + 1, value_dims)]
        args[1] = args[1][..., 1:]
    if tables:
        kwargs["position_bias"] = torch.randn(9)
        kwargs |= {"time_bias": torch.randn(heads, 20), "time_edges": log_time_edges(20)}
        kwargs["timestamps"] = torch.randint(0, 10_000, rows)
    with kernels.force_isa(isa):
        SPEC.compare(pointwise_attention_int8(*args, **kwargs), args, kwargs)


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dims", [64, 256])
def test_extreme_integers_stay_exact(isa: str, dims: int) -> None:
    """All products of one sign, as large as they get: saturation or overflow would show."""
    k = torch.full((1, 1, 200, dims), -128, dtype=torch.int8)
    q, v = k.clone(), k.clone()
    q[:, :, ::3] = 127
    v[:, :, ::5] = 127
    kwargs = {"q_scale": 1e-6, "k_scale": 1.0, "v_scale": 1.0, "targets": 70}
    with kernels.force_isa(isa):
        SPEC.compare(pointwise_attention_int8(q, k, v, **kwargs), (q, k, v), kwargs)


def test_silu_is_within_its_rounding() -> None:
    """Its exponential is off by 2e-7 of itself and 6 steps' roundings, the rest by four."""
    x = torch.linspace(-60, 60, 100_001)
    exact = torch.nn.functional.silu(x.double())
    # x log2(e) is rounded too, which moves e^-x by |x| roundings.
    allowed = (exact.abs() * (2e-7 + (10 + x.double().abs()) * 2.0**-24)) + 1e-30
    assert bool(((silu(x).double() - exact).abs() <= allowed).all())
    far = silu(torch.tensor([-1e30, 1e30]))
    assert far[1] == 1e30
    assert abs(float(far[0])) < 1e-7


@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_the_float_op(causal: bool) -> None:
    """On the same numbers: what is left is the 8 bits of the weights.

    A weight is off by half a step, m / 254, m the largest of its run of at most 64 keys; a row sums
    n of them times |v| <= 1.28, divided by n.
    """
    length = 200
    q, k, v = (bytes_of(2, 2, length, 32, seed=s) for s in range(3))
    options: dict[str, Any] = {
        "targets": 30,
        "causal": causal,
        "position_bias": torch.randn(50)[:49],
    }
    got = pointwise_attention_int8(q, k, v, **SCALES, **options)
    floats = [x.double() * s for x, s in zip((q, k, v), SCALES.values(), strict=True)]
    exact = pointwise_attention(*floats, **options)
    largest = (floats[0] @ floats[1].mT).abs().max() * 32**-0.5 + options["position_bias"].max()
    assert bool(((got - exact).abs() <= 1.28 * largest / 254 + 1e-5).all())
    # Random signs: far better on average.
    assert float((got - exact).abs().mean()) <= 0.02 * float(exact.abs().mean())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_jagged_batch_is_the_padded_one(backend: str) -> None:
    if backend == "cpu" and reason_missing():
        pytest.skip(str(reason_missing()))
    sizes = [0, 1, 90, 17]
    q, k, v = (bytes_of(4, 2, 90, d, seed=d) for d in (16, 16, 5))
    options: dict[str, Any] = SCALES | {"targets": torch.tensor([0, 1, 9, 0]), "norm_length": 90}
    padded = pointwise_attention_int8(
        q, k, v, lengths=torch.tensor(sizes), **options, backend=backend
    )
    flat = [
        torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(sizes)]) for x in (q, k, v)
    ]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    jagged = pointwise_attention_int8(*flat, cu_seqlens=starts, **options, backend=backend)
    for b, n in enumerate(sizes):
        assert torch.equal(jagged[starts[b] : starts[b + 1]].transpose(0, 1), padded[b, :, :n])
        assert not bool(padded[b, :, n:].any())


def test_traces_in_one_graph() -> None:
    q, k, v = (bytes_of(2, 2, 40, 8, seed=s) for s in range(3))

    def call(q: Any, k: Any, v: Any) -> torch.Tensor:
        return pointwise_attention_int8(q, k, v, **SCALES, position_bias=torch.ones(5))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))
    rest = (0.1, 0.1, 0.1, *(None,) * 8, 0.5, None, True)
    torch.library.opcheck(torch.ops.fastrec.pointwise_attention_int8.default, (q, k, v, *rest))


GOOD = {name: bytes_of(2, 2, 6, 8, seed=n) for n, name in enumerate("qkv")}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": GOOD["q"].float()}, DtypeError, "q: expected int8, got torch.float32"),
        ({"k": GOOD["k"].view(torch.uint8)}, DtypeError, "k: expected int8"),
        ({"q": GOOD["q"][0]}, ShapeError, r"q: expected shape \[B, H, L, D\]"),
        ({"k": GOOD["k"][..., 1:]}, ShapeError, "k: expected q's shape"),
        ({"v": GOOD["v"][:, :1]}, ShapeError, "v: expected q's shape .* but for D"),
        ({"q_scale": 0.0}, ArgumentError, "q_scale: expected a finite number > 0"),
        ({"v_scale": math.inf}, ArgumentError, "v_scale: expected a finite number > 0"),
        ({"k_scale": "wide"}, ArgumentError, "k_scale: expected a finite number > 0"),
        ({"q_scale": 1e20, "k_scale": 1e20}, ArgumentError, "q_scale: .* up to 1e30"),
        (
            {"position_bias": torch.tensor([math.nan])},
            ArgumentError,
            "position_bias: expected finite numbers",
        ),
        ({"lengths": torch.tensor([3, 7])}, ArgumentError, r"lengths: expected values in \[0, 6\]"),
        ({"targets": 7}, ArgumentError, "targets: expected values from 0"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ShapeError, r"q: expected shape \[T, H, D\]"),
    ],
)
def test_bad_input_is_named(
    backend: str, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    if backend == "cpu" and reason_missing():
        pytest.skip(str(reason_missing()))
    with pytest.raises(error, match=text):
        pointwise_attention_int8(**GOOD | SCALES | change, backend=backend)

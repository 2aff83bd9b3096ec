"""``activation_quantize``: bad input, gradients, the torch op, and every instruction set alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, DtypeError, ShapeError
from fastrec.kernels import activation_quantize
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.activation_quantize.samples import compare

ISAS = kernels.available_isas() if reason_missing() is None else []
X = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
SUMS, SCALE = torch.arange(8, dtype=torch.int32).reshape(2, 4), torch.ones(4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 80),
    step=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32]),
    activation=st.sampled_from([None, "relu", "gelu"]),
    out=st.sampled_from([None, "bfloat16", "uint8"]),
    scale=st.floats(1e-3, 10.0),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set_gives_the_same_bits(
    rows: int,
    width: int,
    step: int,
    dtype: torch.dtype,
    activation: str | None,
    out: str | None,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width * step, generator=generator)[:, ::step] * 10
    kwargs: dict[str, Any] = {"out": out}
    if out == "uint8":
        kwargs |= {"out_scale": scale, "out_zero_point": seed % 256}
    if dtype is torch.int32:
        x = x * 1e7
        kwargs["scale"], kwargs["bias"] = torch.rand(2, width, generator=generator) * 1e-7
    args = (x.to(dtype), activation)
    results = []
    for isa in ISAS:
        with kernels.force_isa(isa):
            results.append(activation_quantize(*args, **kwargs))
        compare(results[-1], args, kwargs)
        assert torch.equal(results[-1], results[0])


def test_every_bfloat16_in_and_out() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    same = activation_quantize(x, out="bfloat16")
    assert torch.equal(same.isnan(), x.isnan())
    assert torch.equal(same[~x.isnan()], x[~x.isnan()])
    between = x.float() * 1.0000001 + 0.0
    rounded = activation_quantize(between, out="bfloat16")
    assert torch.equal(rounded.nan_to_num(), between.bfloat16().nan_to_num())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_nan_is_never_quantised(backend: str, activation: str | None) -> None:
    for position in (0, 20):
        x = torch.zeros(21)
        x[position] = torch.nan
        with pytest.raises(ArgumentError, match="x: expected numbers, got a NaN"):
            activation_quantize(x, activation, out="uint8", out_scale=1.0, backend=backend)
        y = activation_quantize(x, activation, backend=backend)
        assert y.isnan().nonzero().tolist() == [[position]]


def test_infinities_clip() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 1e38])
    y = activation_quantize(x, out="uint8", out_scale=0.01, out_zero_point=9)
    assert y.tolist() == [255, 0, 255]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((X.half(),), {}, DtypeError, "x: expected float32, bfloat16 or int32"),
        ((X, "tanh"), {}, ArgumentError, "activation: expected None, 'relu' or 'gelu'"),
        ((X,), {"out": "int4"}, ArgumentError, "out: expected"),
        ((X,), {"out": "uint8"}, ArgumentError, "out_scale"),
        ((X,), {"out_scale": 1.0}, ArgumentError, "out_scale"),
        ((X,), {"out": "uint8", "out_scale": -1.0}, ArgumentError, "out_scale"),
        ((X,), {"out": "uint8", "out_scale": 1.0, "out_zero_point": -1}, ArgumentError, "zero"),
        ((X,), {"scale": SCALE}, ArgumentError, "scale: expected None unless x is int32"),
        ((SUMS,), {}, ArgumentError, "scale"),
        ((SUMS,), {"scale": SCALE[:3]}, ShapeError, r"scale: expected shape \[4\]"),
        ((SUMS,), {"scale": SCALE, "bias": SCALE.double()}, DtypeError, "bias"),
        ((X.double(),), {"backend": "cpu"}, BackendError, "float64"),
    ],
)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        activation_quantize(*args, **kwargs)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients(activation: str | None) -> None:
    x = X.double().add(0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: activation_quantize(x, activation), (x,))
    single = x.detach().float().requires_grad_()
    grad = torch.autograd.grad(activation_quantize(single, activation).sum(), single)[0]
    exact = torch.autograd.grad(activation_quantize(x, activation).sum(), x)[0]
    # A few roundings of values up to 1.2.
    assert (grad - exact).abs().max() <= 8 * 2**-24 * 1.2


@pytest.mark.parametrize(("args", "kwargs"), [((X,), {}), ((SUMS,), {"scale": SCALE})])
def test_compiles_and_passes_opcheck(args: Any, kwargs: Any) -> None:
    op = torch.ops.fastrec.activation_quantize.default
    torch.library.opcheck(op, (*args, "gelu"), kwargs)
    torch.library.opcheck(op, (X.clone().requires_grad_(), "relu", None, None, "bfloat16"))
    kwargs |= {"out": "uint8", "out_scale": 0.1}
    torch.library.opcheck(op, (*args, "relu"), kwargs)
    compiled = torch.compile(activation_quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(*args, "gelu", **kwargs), activation_quantize(*args, "gelu", **kwargs)
    )

"""``layer_norm_quantize``: bad input, gradients, the torch op, and every instruction set alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, DtypeError, ShapeError
from fastrec.kernels import layer_norm_quantize
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.layer_norm_quantize.samples import compare

ISAS = kernels.available_isas() if reason_missing() is None else []
X = torch.arange(24.0).reshape(2, 3, 4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    dims=st.integers(1, 300),
    step=st.integers(1, 2),
    residual=st.booleans(),
    affine=st.booleans(),
    scale=st.one_of(st.none(), st.floats(1e-3, 10.0)),
    total=st.booleans(),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e15]),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set_gives_the_reference_bits(
    rows: int,
    dims: int,
    step: int,
    residual: bool,
    affine: bool,
    scale: float | None,
    total: bool,
    size: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, dims * step, generator=generator) * size)[:, ::step]
    args = (x, *torch.randn(2, dims, generator=generator).unbind(0)) if affine else (x,)
    kwargs: dict[str, Any] = {"out_scale": scale, "out_zero_point": seed % 256}
    kwargs["residual"] = torch.randn(rows, dims, generator=generator) if residual else None
    kwargs["return_sum"] = total
    for isa in ISAS:
        with kernels.force_isa(isa):
            compare(layer_norm_quantize(*args, **kwargs), args, kwargs)


@pytest.mark.parametrize("dims", [1, 7, 100, 128, 1000, 4099])
def test_close_to_torch(dims: int) -> None:
    """Error against fp64 at most twice torch's and four roundings of the largest output."""
    generator = torch.Generator().manual_seed(dims)
    x = torch.randn(20, dims, generator=generator) + 5
    weight, bias = torch.randn(2, dims, generator=generator).unbind(0)
    exact = F.layer_norm(x.double(), (dims,), weight.double(), bias.double())
    theirs = (F.layer_norm(x, (dims,), weight, bias) - exact).abs().max()
    ours = (layer_norm_quantize(x, weight, bias) - exact).abs().max()
    assert ours <= 2 * theirs + 4 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize("target", ["x", "residual", "other"])
def test_the_sum_goes_where_it_is_asked_for(target: str) -> None:
    x, residual = X.clone(), X.flip(0).contiguous()
    want, want_sum = layer_norm_quantize(x, residual=residual, return_sum=True)
    assert torch.equal(want_sum, x + residual)
    out = {"x": x, "residual": residual, "other": torch.empty_like(x)}[target]
    got, got_sum = layer_norm_quantize(x, residual=residual, sum_out=out)
    assert got_sum is out
    assert torch.equal(out, want_sum)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_is_never_quantised(backend: str) -> None:
    for bad in (torch.nan, torch.inf):
        x = X.clone()
        x[1, 2, 3] = bad
        with pytest.raises(ArgumentError, match="x: expected rows whose norm is a number"):
            layer_norm_quantize(x, out_scale=0.1, backend=backend)
        y = layer_norm_quantize(x, backend=backend)
        assert bool(y[1, 2].isnan().all())
        assert int(y.isnan().sum()) == 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infinite_outputs_clip(backend: str) -> None:
    weight = torch.tensor([torch.inf, 1, 1, -torch.inf])
    y = layer_norm_quantize(X, weight, out_scale=0.1, out_zero_point=7, backend=backend)
    assert y[0, 0].tolist()[0] == 0
    assert y[0, 0].tolist()[3] == 0


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((X.half(),), {}, DtypeError, "x: expected float32"),
        ((torch.zeros(()),), {}, ShapeError, "x"),
        ((torch.zeros(3, 0),), {}, ShapeError, "x"),
        ((X, torch.ones(3)), {}, ShapeError, r"weight: expected shape \[4\], got \[3\]"),
        ((X, None, torch.ones(4).double()), {}, DtypeError, "bias: expected float32"),
        ((X,), {"residual": X[0]}, ShapeError, "residual"),
        ((X,), {"eps": -1.0}, ArgumentError, "eps"),
        ((X,), {"eps": float("nan")}, ArgumentError, "eps"),
        ((X,), {"out_scale": 0.0}, ArgumentError, "out_scale"),
        ((X,), {"out_scale": 1e-40}, ArgumentError, "out_scale"),
        ((X,), {"out_scale": 1.0, "out_zero_point": 256}, ArgumentError, "out_zero_point"),
        ((X,), {"sum_out": X.double()}, DtypeError, "sum_out"),
        ((X,), {"sum_out": X.transpose(0, 2).contiguous().transpose(0, 2)}, ArgumentError, "sum_"),
        ((X.double(),), {"backend": "cpu"}, BackendError, "it computes in float32"),
    ],
)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        layer_norm_quantize(*args, **kwargs)


def loss(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
    return layer_norm_quantize(x, weight, bias, residual=residual, return_sum=True)


def leaves(dtype: torch.dtype, dims: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, dims), (dims,), (dims,), (3, dims)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_gradcheck() -> None:
    x, weight, bias, residual = leaves(torch.float64)
    assert torch.autograd.gradcheck(loss, (x, weight, bias, residual))
    assert torch.autograd.gradcheck(layer_norm_quantize, (x,))


def test_gradients_do_not_depend_on_threads_and_match_fp64() -> None:
    def gradients(dtype: torch.dtype, threads: int) -> tuple[torch.Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = [t.to(dtype).detach().requires_grad_() for t in leaves(torch.float32, 333)]
            y, total = loss(*inputs)
            return torch.autograd.grad((y * y.detach().cos() + total).sum(), inputs)
        finally:
            torch.set_num_threads(before)

    alone, together = gradients(torch.float32, 1), gradients(torch.float32, 2)
    for one, two, exact in zip(alone, together, gradients(torch.float64, 1), strict=True):
        assert torch.equal(one, two)
        # Some twenty roundings of values up to the largest gradient.
        assert (one - exact).abs().max() <= 32 * 2**-24 * exact.abs().max()


def test_compiles_and_passes_opcheck() -> None:
    x, weight, bias, residual = leaves(torch.float32)
    op = torch.ops.fastrec.layer_norm_quantize.default
    torch.library.opcheck(op, (x, weight, bias, residual, 1e-5, None, 0, True))
    torch.library.opcheck(op, (x.detach(), None, None, None, 1e-5, 0.1, 3, False))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outputs = compiled(x, weight, bias, residual), loss(x, weight, bias, residual)
    for got, want in zip(*outputs, strict=True):
        assert torch.equal(got, want)
    quantise = torch.compile(layer_norm_quantize, fullgraph=True, backend="aot_eager")
    kwargs = {"out_scale": 0.1, "out_zero_point": 9}
    assert torch.equal(quantise(X, **kwargs), layer_norm_quantize(X, **kwargs))

"""``window_sparse_attention``'s Triton kernels against the reference: interpreted, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrec import AttentionPattern, env
from fastrec.errors import ArgumentError, BackendError
from fastrec.kernels import window_sparse_attention
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Sample
from fastrec.kernels.window_sparse_attention import SPEC

DEVICE = "cpu" if env.triton_interpret() else "cuda"
WHY_NOT = triton_can_run(Signature(DEVICE))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")
# The interpreter takes a millisecond a tile of far positions. A case that is short for one program
# runs in tiles too, if it is small.
SMALL = [case for case in SPEC.samples() if case.macs <= 120_000 and not case.bench]
TILED = [case for case in SMALL if case.macs <= 15_000 or "jagged" in case.name]
SHORT = [case for case in SMALL if "jagged" not in case.name]


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["short", "tiled"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the forward's kernels takes a short sequence."""
    if request.param == "tiled":
        from fastrec.kernels.window_sparse_attention import _triton

        monkeypatch.setattr(_triton, "is_short", lambda *_: False)


CONTRACT = [pytest.param("short", case, id=f"short-{case.name}") for case in SHORT]
CONTRACT += [pytest.param("tiled", case, id=f"tiled-{case.name}") for case in TILED]


@runs
@pytest.mark.parametrize(("kernel", "case"), CONTRACT, indirect=["kernel"])
def test_contract_samples(kernel: None, case: Sample) -> None:
    args, kwargs = case.make()
    on_device = {name: there(value) for name, value in kwargs.items()}
    out = window_sparse_attention(*map(there, args), **on_device, backend="triton")
    SPEC.compare(out.cpu(), args, kwargs)


@runs
def test_rows_that_see_nothing(kernel: None) -> None:
    q, k, v = draw(3, 2, 1, 40, 8)
    k[1, :, 5:] = v[1, :, 5:] = torch.nan
    out, lse = window_sparse_attention(
        *map(there, (q, k, v)),
        AttentionPattern(2, "none"),
        lengths=there(torch.tensor([0, 5])),
        return_lse=True,
        backend="triton",
    )
    assert lse.dtype == torch.float32
    assert bool((out[0] == 0).all())
    assert bool((lse[0] == -torch.inf).all())
    # Row 6 still sees key 4, row 7 sees none of the five.
    torch.testing.assert_close(out[1, 0, 6].cpu(), v[1, 0, 4])
    assert bool((out[1, :, 7:] == 0).all())
    assert bool((lse[1, :, 7:] == -torch.inf).all())
    assert bool(lse[1, :, :7].isfinite().all())


@runs
@pytest.mark.parametrize("jagged", [False, True])
def test_log_sum_exp(kernel: None, jagged: bool) -> None:
    pattern = AttentionPattern(1, ((9, 30), (4, 17), ()), causal=True)
    q, k, v = draw(45, 3, 3, 8).unbind(1) if jagged else draw(3, 2, 3, 45, 8)
    kwargs: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 1, 41, 45])} if jagged else {}
    _, exact = SPEC.reference(q, k, v, pattern, **kwargs, return_lse=True)
    on_device = {name: there(value) for name, value in kwargs.items()}
    _, lse = window_sparse_attention(
        *map(there, (q, k, v)), pattern, **on_device, return_lse=True, backend="triton"
    )
    # A sum of D = 8 products of numbers below 4, and of at most 33 exponentials: 50 roundings.
    torch.testing.assert_close(lse.cpu().double(), exact, rtol=0, atol=50 * 4 * 2**-24)


@runs
def test_gradients_are_deterministic() -> None:
    inputs = [*map(there, draw(3, 1, 1, 70, 8))]
    args = (inputs, AttentionPattern(2, (20,)), {}, torch.ones_like(inputs[0]), None, "triton")
    for one, other in zip(gradients(*args), gradients(*args), strict=True):
        assert torch.equal(one, other)


@runs
def test_a_view_that_is_not_aligned_is_read_in_place(kernel: None) -> None:
    """Loads of 16 bytes would be refused by a GPU."""
    field = draw(1, 2, 40, 17, dtype=torch.bfloat16)
    args = tuple(field[..., n : n + 16] for n in (0, 1, 1))
    pattern = AttentionPattern(3, "log2")
    out = window_sparse_attention(*map(there, args), pattern, backend="triton")
    SPEC.compare(out.cpu(), (*args, pattern), {})


@runs
def test_lengths_out_of_range(kernel: None) -> None:
    """On a CPU an error; a GPU does not wait for one, and reads nothing that is not there."""
    q, k, v = map(there, draw(3, 2, 1, 20, 8))
    lengths = there(torch.tensor([20, 99]))
    if DEVICE == "cpu":
        with pytest.raises(ArgumentError, match=r"lengths: .*\[0, 20\], got 99"):
            window_sparse_attention(q, k, v, AttentionPattern(2), lengths=lengths, backend="triton")
    else:
        out = window_sparse_attention(q, k, v, AttentionPattern(2), lengths=lengths)
        assert torch.equal(out, window_sparse_attention(q, k, v, AttentionPattern(2)))


def gradients(
    inputs: Any, pattern: AttentionPattern, kwargs: Any, d_out: Any, d_lse: Any, backend: str
) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = window_sparse_attention(*leaves, pattern, return_lse=True, backend=backend, **kwargs)
    outputs = (out,) if d_lse is None else (out, lse)
    grads = (d_out.to(out.dtype),) if d_lse is None else (d_out.to(out.dtype), d_lse.to(lse.dtype))
    return torch.autograd.grad(outputs, leaves, grads)


PATTERNS = (
    AttentionPattern(3, "log2"),
    AttentionPattern(2, "strided:9", causal=True),
    AttentionPattern(1, ((9, 30), (4, 17), ()), causal=True),
    AttentionPattern(2, "random", num_random=3, max_length=40, seed=5),
    AttentionPattern(100, "none"),
)
GRADIENTS = [
    (torch.float32, PATTERNS[0], "lengths"),
    (torch.float32, PATTERNS[0], "jagged"),
    (torch.float32, PATTERNS[1], "lengths"),
    (torch.float32, PATTERNS[2], "jagged"),
    (torch.float32, PATTERNS[3], "lengths"),
    (torch.float32, PATTERNS[4], "lengths"),
    (torch.bfloat16, PATTERNS[2], "jagged"),
    (torch.float16, PATTERNS[2], "lengths"),
]


@runs
@pytest.mark.parametrize(("dtype", "pattern", "layout"), GRADIENTS, ids=str)
def test_gradients(dtype: torch.dtype, pattern: AttentionPattern, layout: str) -> None:
    """Against fp64, with the bound that ``test_window_sparse_attention.check_gradients`` derives.

    16-bit weights and their gradients are rounded before they are multiplied, which adds a
    rounding of each of the n terms to the one that delta brings.
    """
    kwargs: dict[str, Any]
    if layout == "jagged":
        inputs = draw(47, 3, 3, 20, dtype=dtype).unbind(1)
        kwargs = {"cu_seqlens": torch.tensor([0, 1, 1, 36, 47])}
    else:
        inputs = draw(3, 2, 3, 36, 16, dtype=dtype).unbind(0)
        kwargs = {"lengths": torch.tensor([21, 36]), "scale": -0.4}
        for x in inputs[1:]:
            x[0, :, 21:] = torch.nan
    d_out = draw(*inputs[0].shape, seed=7).to(dtype)
    d_lse = draw(*inputs[0].shape[:-1], seed=8) if pattern.causal else None
    doubles = [x.double() for x in inputs]
    exact = gradients(doubles, pattern, kwargs, d_out.double(), d_lse, "reference")
    on_device = {name: there(value) for name, value in kwargs.items()}
    got = gradients([*map(there, inputs)], pattern, on_device, there(d_out), there(d_lse), "triton")
    q, k, v = doubles
    size_q, size_k, size_v, size_d = (
        x.double().nan_to_num().norm(dim=-1).max().item() for x in (q, k, v, d_out)
    )
    dims, length = q.shape[-1], 36
    scale = abs(kwargs.get("scale", dims**-0.5))
    most = max(len(pattern.distances(length, head)) for head in range(3))
    n = min(2 * (pattern.window + most) + 1, length)
    error = 2 * (dims + 4) * scale * size_q * size_k + dims + n + 8
    slope = 2 * size_d * size_v + (0 if d_lse is None else d_lse.abs().max().item())
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    sizes = (scale * slope * size_k, scale * slope * size_q, size_d)
    for x, expected, size in zip(got, exact, sizes, strict=True):
        assert x.dtype == dtype
        bound = n * error * 2**-24 * size + rounding * (expected.abs().max() + 2 * n * size)
        off = (x.cpu().double() - expected).abs().max()
        assert off <= bound, f"{off:.3g} > {bound:.3g}"
        # The bound is the worst case of n errors alike; a wrong pair or factor stands out by far.
        tolerance = 1e-4 if dtype is torch.float32 else 8 * rounding
        torch.testing.assert_close(
            x.cpu().double(), expected, rtol=10 * tolerance, atol=tolerance * max(1.0, size)
        )


def test_doubles_are_for_the_reference() -> None:
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match="float32, bfloat16, float16, the input is float64"):
        window_sparse_attention(x, x, x, AttentionPattern(2), backend="triton")

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
# The interpreter takes a millisecond a tile of far positions.
SMALL = [case for case in SPEC.samples() if case.macs <= 120_000 and not case.bench]


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@runs
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contract_samples(case: Sample) -> None:
    args, kwargs = case.make()
    on_device = {name: there(value) for name, value in kwargs.items()}
    out = window_sparse_attention(*map(there, args), **on_device, backend="triton")
    SPEC.compare(out.cpu(), args, kwargs)


@runs
def test_rows_that_see_nothing() -> None:
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
def test_log_sum_exp(jagged: bool) -> None:
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
def test_a_view_that_is_not_aligned_is_read_in_place() -> None:
    """Loads of 16 bytes would be refused by a GPU."""
    field = draw(1, 2, 40, 17, dtype=torch.bfloat16)
    args = tuple(field[..., n : n + 16] for n in (0, 1, 1))
    pattern = AttentionPattern(3, "log2")
    out = window_sparse_attention(*map(there, args), pattern, backend="triton")
    SPEC.compare(out.cpu(), (*args, pattern), {})


@runs
def test_lengths_out_of_range() -> None:
    """On a CPU an error; a GPU does not wait for one, and reads nothing that is not there."""
    q, k, v = map(there, draw(3, 2, 1, 20, 8))
    lengths = there(torch.tensor([20, 99]))
    if DEVICE == "cpu":
        with pytest.raises(ArgumentError, match=r"lengths: .*\[0, 20\], got 99"):
            window_sparse_attention(q, k, v, AttentionPattern(2), lengths=lengths, backend="triton")
    else:
        out = window_sparse_attention(q, k, v, AttentionPattern(2), lengths=lengths)
        assert torch.equal(out, window_sparse_attention(q, k, v, AttentionPattern(2)))


def test_doubles_are_for_the_reference() -> None:
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match="float32, bfloat16, float16, the input is float64"):
        window_sparse_attention(x, x, x, AttentionPattern(2), backend="triton")

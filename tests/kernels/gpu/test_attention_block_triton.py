"""The fused attention block against the three ops in fp64: interpreted, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrec import AttentionPattern, env
from fastrec.errors import ArgumentError, BackendError, ShapeError
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels.window_sparse_attention.block import window_sparse_attention_block

DEVICE = "cpu" if env.triton_interpret() else "cuda"
WHY_NOT = triton_can_run(Signature(DEVICE))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")


def inputs(batch: int, length: int, d: int, dtype: torch.dtype, bias: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    biases = (draw(3 * d), draw(d)) if bias else None
    return [draw(batch, length, d), draw(3 * d, d) * d**-0.5, draw(d, d) * d**-0.5, biases]


@runs
@pytest.mark.skipif(
    DEVICE == "cuda" and WHY_NOT is None and torch.cuda.get_device_capability() < (9, 0),
    reason="before sm_90 it does not fit the registers",
)
@pytest.mark.parametrize(
    ("length", "d", "heads", "pattern", "lengths", "dtype"),
    [
        (20, 32, 2, AttentionPattern(3, "log2"), (0, 13), torch.bfloat16),
        (33, 30, 3, AttentionPattern(1, ((9, 30), (4, 17), ()), causal=True), None, torch.float16),
        (1, 16, 1, AttentionPattern(0, "none"), (1, 0), torch.float16),
    ],
    ids=str,
)
def test_agrees_with_the_three_ops(
    length: int,
    d: int,
    heads: int,
    pattern: AttentionPattern,
    lengths: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> None:
    """At most twice the error of the three ops in this dtype, plus a floor: the weights' rounding,
    a unit of the largest value through the output's weights, and the result's own."""
    x, in_weight, out_weight, biases = inputs(2, length, d, dtype, bias=heads > 1)
    options: dict[str, Any] = {"heads": heads}
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths)

    def run(change: Any, backend: str) -> torch.Tensor:
        changed = None if biases is None else tuple(change(bias) for bias in biases)
        moved = {
            n: v.to(DEVICE) if backend == "triton" and n == "lengths" else v
            for n, v in options.items()
        }
        args = (change(x), change(in_weight), change(out_weight), changed, pattern)
        return window_sparse_attention_block(*args, **moved, backend=backend).cpu().double()

    exact = run(torch.Tensor.double, "composed")
    plain = run(lambda t: t, "composed")
    got = run(lambda t: t.to(DEVICE), "triton")
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    v = torch.nn.functional.linear(
        x.double(),
        in_weight[2 * d :].double(),
        None if biases is None else biases[0][2 * d :].double(),
    )
    floor = unit * (v.abs().max() * out_weight.double().abs().sum(1).max() + exact.abs().max())
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


def test_what_can_not_be_fused_is_composed_or_refused() -> None:
    args = inputs(1, 5, 16, torch.float32)
    y = window_sparse_attention_block(*args, AttentionPattern(2), heads=2)
    assert y.shape == (1, 5, 16)
    with pytest.raises(BackendError, match="bfloat16 or float16, the input is float32"):
        window_sparse_attention_block(*args, AttentionPattern(2), heads=2, backend="triton")
    with pytest.raises(BackendError, match="expected one of triton, composed"):
        window_sparse_attention_block(*args, AttentionPattern(2), heads=2, backend="cpu")
    args[0].requires_grad_()
    window_sparse_attention_block(*args, AttentionPattern(2), heads=2).sum().backward()
    assert args[0].grad is not None


def test_bad_input() -> None:
    x, in_weight, out_weight, biases = inputs(1, 5, 16, torch.float32)
    pattern = AttentionPattern(2)
    with pytest.raises(ArgumentError, match="heads: expected a divisor of d = 16, got 3"):
        window_sparse_attention_block(x, in_weight, out_weight, biases, pattern, heads=3)
    with pytest.raises(ShapeError, match=r"in_weight: expected shape \[48, 16\]"):
        window_sparse_attention_block(x, out_weight, out_weight, biases, pattern, heads=2)

"""Attention written as products and a softmax becomes one step, with the answers of the many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fastrec.exporters.model_spec import spec_of
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower
from fastrec.runtime.native.passes import optimise

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


class Attention(nn.Module):
    """[B, H, L, D] (or [B, L, D]) and lengths to the mixed values."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = weights
        self.register_buffer("root", torch.tensor(2.5))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        q, k, v = x * 1.5, x + 0.25, x - 1
        return self.weights(self, q, k, lengths) @ v


def behind(q: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """True where a key lies beyond the length: [B, 1, .., L]."""
    hidden = torch.arange(q.shape[-2]) >= n[:, None]
    return hidden[:, None, None] if q.dim() == 4 else hidden[:, None]


def later(q: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


INF = float("inf")
# Name -> (weights, the kind of step)
FORMS: dict[str, tuple[Any, str]] = {
    "plain": (lambda s, q, k, n: (q @ k.mT).softmax(-1), "attention"),
    "divided": (lambda s, q, k, n: scores(q, k).softmax(-1), "attention"),
    "multiplied": (lambda s, q, k, n: (q @ k.mT * 0.3).softmax(-1), "attention"),
    "by a buffer": (lambda s, q, k, n: (q @ k.mT / s.root).softmax(-1), "attention"),
    "twice": (lambda s, q, k, n: (0.5 * (q @ k.mT) / s.root).softmax(-1), "attention"),
    "negative": (lambda s, q, k, n: (q @ k.mT * -0.3).softmax(-1), "attention"),
    "padded": (
        lambda s, q, k, n: scores(q, k).masked_fill(behind(q, n), -INF).softmax(-1),
        "masked_attention",
    ),
    "padded, finite": (
        lambda s, q, k, n: scores(q, k).masked_fill(behind(q, n), -1e9).softmax(-1),
        "masked_attention",
    ),
    "where": (
        lambda s, q, k, n: torch.where(behind(q, n), -INF, scores(q, k)).softmax(-1),
        "masked_attention",
    ),
    "where not": (
        lambda s, q, k, n: torch.where(~behind(q, n), scores(q, k), -1e9).softmax(-1),
        "masked_attention",
    ),
    "added": (
        lambda s, q, k, n: (scores(q, k) + behind(q, n) * -1e9).softmax(-1),
        "masked_attention",
    ),
    "added first": (
        lambda s, q, k, n: (behind(q, n) * -1e9 + scores(q, k)).softmax(-1),
        "masked_attention",
    ),
    # Where all keys are hidden, the last bits of 10,000 are 1e-3 of a score.
    "a bias too": (
        lambda s, q, k, n: (scores(q, k) + q[..., :1] + behind(q, n.clamp(1)) * -1e4).softmax(-1),
        "masked_attention",
    ),
    "causal": (
        lambda s, q, k, n: scores(q, k).masked_fill(later(q), -INF).softmax(-1),
        "causal_attention",
    ),
    "causal, finite": (
        lambda s, q, k, n: torch.where(~later(q), scores(q, k), -1e9).softmax(-1),
        "causal_attention",
    ),
    "causal and padded": (
        lambda s, q, k, n: (
            scores(q, k).masked_fill(later(q), -1e9).masked_fill(behind(q, n), -1e9).softmax(-1)
        ),
        "masked_attention",
    ),
    "causal or padded": (
        lambda s, q, k, n: scores(q, k).masked_fill(later(q) | behind(q, n), -INF).softmax(-1),
        "masked_attention",
    ),
    # Nothing that a kernel of attention computes.
    "masked before it is scaled": (
        lambda s, q, k, n: ((q @ k.mT).masked_fill(behind(q, n), -1e9) / 7).softmax(-1),
        "matmul",
    ),
    "filled with a usual number": (
        lambda s, q, k, n: scores(q, k).masked_fill(behind(q, n), 0.5).softmax(-1),
        "matmul",
    ),
    "capped": (lambda s, q, k, n: scores(q, k).tanh().softmax(-1), "matmul"),
    "over the queries": (lambda s, q, k, n: scores(q, k).softmax(-2), "matmul"),
}


@pytest.mark.parametrize("length", [1, 17, 40])
@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("name", FORMS)
def test_one_step(name: str, heads: tuple[int, ...], length: int) -> None:
    weights, kind = FORMS[name]
    model = Attention(weights).eval()
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(8, *heads, length, 8, generator=generator)
    # One of them sees nothing: NaN after -inf, all alike after a finite number.
    n = torch.tensor([length, 0, 1, length // 2, 1, length, (length + 1) // 2, 0])
    spec = spec_of(model, (x, n))
    plan = lower(model, (x[:2], n[:2]), spec)
    optimise(plan)
    kinds = [step.kind for step in plan.steps]
    if length > 1:
        assert kind in kinds
        assert (kind == "matmul") == ("softmax" in kinds)
    engine = PlanEngine(
        plan, backend="native", precision="fp32", threads=2, spec=spec, rows=[], versions={}
    )
    for batch in range(1, 9):
        with torch.inference_mode():
            expected = model(x[:batch], n[:batch])
        torch.testing.assert_close(
            engine(x[:batch], n[:batch]), expected, rtol=2e-5, atol=2e-5, equal_nan=True
        )


def test_weights_that_others_read_are_there() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = (x @ x.mT).softmax(-1)
            return (weights @ x).sum(-1) + weights.sum(-2)

    model, x = Both().eval(), torch.randn(3, 2, 9, 8)
    spec = spec_of(model, (x,))
    plan = lower(model, (x,), spec)
    optimise(plan)
    assert {"attention", "softmax", "matmul"} <= {step.kind for step in plan.steps}
    engine = PlanEngine(
        plan, backend="native", precision="fp32", threads=2, spec=spec, rows=[], versions={}
    )
    torch.testing.assert_close(engine(x), model(x), rtol=2e-5, atol=2e-5)

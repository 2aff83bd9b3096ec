"""``HstuBlock``: the published layer, padding, candidates, state, tracing, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrec.errors import ArgumentError, FastrecError, ShapeError
from fastrec.nn import HstuBlock


def block(**options: Any) -> HstuBlock:
    torch.manual_seed(0)
    module = HstuBlock(24, 3, **{"max_length": 30, "time_buckets": 20} | options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(batch: int = 2, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, 24, generator=generator)
    return x, torch.randint(0, 50, (batch, length), generator=generator).cumsum(1) ** 2


def published(m: HstuBlock, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The layer of the paper, dense, for sequences of max_length."""
    batch, n, _ = x.shape
    width = 3 * m.value_dim
    h = F.layer_norm(x, (24,), m.norm.weight, m.norm.bias, 1e-6)
    h = F.silu(F.linear(h, m.in_proj.weight, m.in_proj.bias))
    u, v, q, k = h.split([width, width, 3 * m.attention_dim, 3 * m.attention_dim], -1)
    v = v.view(batch, n, 3, -1)
    q, k = (part.view(batch, n, 3, m.attention_dim) for part in (q, k))
    i = torch.arange(n)
    apart = (times[:, :, None] - times[:, None]).abs().clamp(min=1).double()
    bucket = (apart.log() / 0.301 + 1e-12).long().clamp(max=len(m.time_bias) - 1)
    bias = m.position_bias[n - 1 + i[None] - i[:, None]] + m.time_bias[bucket]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * m.attention_dim**-0.5 + bias[:, None]
    heads = torch.einsum("bhij,bjhd->bihd", F.silu(scores).tril() / n, v).flatten(2)
    gated = u * F.layer_norm(heads, (width,), m.out_norm.weight, m.out_norm.bias, 1e-6)
    return x + F.linear(gated, m.out_proj.weight, m.out_proj.bias)


@pytest.mark.parametrize("options", [{}, {"attention_dim": 5, "value_dim": 11}], ids=str)
def test_the_published_layer_and_its_gradients(options: dict[str, int]) -> None:
    """In float64, and within float32's rounding on the kernel."""
    x, times = inputs()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        module = block(**options).to(dtype)
        x = x.to(dtype).requires_grad_()
        expected = published(module, x, times)
        got = module(x, timestamps=times)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        leaves = [x, *module.parameters()]
        weights = torch.linspace(-1, 1, got.numel(), dtype=dtype).view(got.shape)
        for name, one, other in zip(
            ["x", *dict(module.named_parameters())],
            torch.autograd.grad((got * weights).sum(), leaves),
            torch.autograd.grad((expected * weights).sum(), leaves),
            strict=True,
        ):
            size = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(
                one, other, rtol=0, atol=10 * tolerance * size, msg=lambda m, name=name: name + m
            )


def test_a_jagged_batch_is_the_padded_one() -> None:
    module, (x, times) = block().eval(), inputs(3)
    lengths = torch.tensor([30, 0, 17])
    x[2, 17:] = torch.nan
    with torch.no_grad():
        padded = module(x, lengths=lengths, timestamps=times, targets=torch.tensor([4, 0, 2]))
        jagged = module(
            torch.cat([x[0], x[2, :17]]),
            cu_seqlens=torch.tensor([0, 30, 30, 47]),
            timestamps=torch.cat([times[0], times[2, :17]]),
            targets=torch.tensor([4, 0, 2]),
        )
    # Products of other shapes, summed in another order.
    torch.testing.assert_close(jagged[:30], padded[0])
    torch.testing.assert_close(jagged[30:], padded[2, :17])


def test_candidates_do_not_see_each_other() -> None:
    module, (x, times) = block(max_length=None).eval(), inputs(1)
    with torch.no_grad():
        together = module(x, timestamps=times, targets=10, norm_length=30)
        for n in range(20, 30):
            rows = [*range(20), n]
            alone = module(x[:, rows], timestamps=times[:, rows], targets=1, norm_length=30)
            torch.testing.assert_close(alone[:, 20], together[:, n])


def test_state_copies_dtypes_and_dropout() -> None:
    module, (x, times) = block(dropout=0.5).eval(), inputs()
    with torch.no_grad():
        expected = module(x, timestamps=times)
        other = HstuBlock(24, 3, max_length=30, time_buckets=20)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.eval()(x, timestamps=times), expected)
        half = copy.deepcopy(module).bfloat16()(x.bfloat16(), timestamps=times)
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
        assert not torch.equal(module.train()(x, timestamps=times), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = module.eval()(x, timestamps=times)
    y.float().sum().backward()
    assert module.position_bias is not None
    assert module.position_bias.grad is not None
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


def test_compiles_and_exports_with_free_sizes() -> None:
    """Norms are torch's in a graph, in eager inference the engine's: other last bits."""
    module, (x, times) = block(max_length=None).eval(), inputs()
    lengths = torch.tensor([30, 11])
    options = {"lengths": lengths, "timestamps": times}
    with torch.no_grad():
        expected = module(x, **options)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(x, **options), expected)
        batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=4096)
        shapes = {"x": {0: batch, 1: length}, "timestamps": {0: batch, 1: length}}
        shapes["lengths"] = {0: batch}
        exported = torch.export.export(module, (x,), options, dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(x, **options), expected)
        x, times = inputs(3, 41)
        options = {"lengths": torch.tensor([41, 0, 5]), "timestamps": times}
        torch.testing.assert_close(exported(x, **options), module(x, **options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 0}, "num_heads: expected a positive integer"),
        ({"embed_dim": 25}, "embed_dim: expected a multiple of num_heads = 3"),
        ({"dropout": 1.0}, "dropout: expected a rate"),
        ({"max_length": 0}, "max_length: expected a positive integer"),
        ({"value_dim": -1}, "value_dim: expected a positive integer"),
        ({"time_buckets": 5000}, "buckets: expected an integer in"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        HstuBlock(**{"embed_dim": 24, "num_heads": 3} | options)


def test_bad_input_leaves_the_module_usable() -> None:
    module, (x, times) = block(), inputs()
    with pytest.raises(ShapeError, match=r"x: expected shape \[B, L, 24\]"):
        module(x[..., 1:], timestamps=times)
    with pytest.raises(ShapeError, match=r"x: expected shape \[T, 24\]"):
        module(x, timestamps=times, cu_seqlens=torch.tensor([0, 60]))
    with pytest.raises(FastrecError, match="timestamps: expected a tensor with time_bias"):
        module(x)
    assert module(x, timestamps=times).isfinite().all()

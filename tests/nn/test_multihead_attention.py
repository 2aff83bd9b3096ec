"""``fastrec.nn.MultiheadAttention`` against torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrec.errors import ArgumentError, DtypeError, FastrecError
from fastrec.nn import MultiheadAttention


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    return {
        "batch": draw(st.sampled_from([None, 1, 3])),
        "queries": draw(st.integers(1, 6)),
        "keys": draw(st.integers(1, 7)),
        "heads": draw(st.sampled_from([1, 2, 4])),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "padding": draw(st.sampled_from([None, "bool", "float"])),
        "mask": draw(st.sampled_from([None, "bool", "float", "each head"])),
        "weights": draw(st.booleans()),
        "average": draw(st.booleans()),
        "widths": draw(st.sampled_from([(None, None), (5, 7)])),
    }


def mask_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    hidden = torch.rand(shape) < 0.3
    hidden[..., 0] = False  # a row without a key is a test of its own
    return hidden if kind == "bool" else torch.randn(shape).masked_fill(hidden, -torch.inf)


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_results_and_weights_are_torchs(case: dict[str, Any]) -> None:
    torch.manual_seed(1)
    d, heads, batch = 8, case["heads"], case["batch"]
    kdim, vdim = case["widths"]
    theirs = nn.MultiheadAttention(
        d, heads, bias=case["bias"], kdim=kdim, vdim=vdim, batch_first=case["batch_first"]
    ).eval()
    ours = MultiheadAttention.from_float(theirs)

    def rows(count: int, width: int) -> Tensor:
        x = torch.randn(batch or 1, count, width)
        x = x if case["batch_first"] or batch is None else x.transpose(0, 1)
        return x if batch else x[0]

    query, keys = rows(case["queries"], d), case["keys"]
    inputs = query, rows(keys, kdim or d), rows(keys, vdim or d)
    options: dict[str, Any] = {
        "need_weights": case["weights"],
        "average_attn_weights": case["average"],
    }
    if case["padding"] is not None:
        options["key_padding_mask"] = mask_of(case["padding"], (batch, keys) if batch else (keys,))
    if case["mask"] == "each head":
        shape = ((batch or 1) * heads, case["queries"], keys)
        options["attn_mask"] = mask_of("float", shape)
    elif case["mask"] is not None:
        options["attn_mask"] = mask_of(case["mask"], (case["queries"], keys))
    kinds = {m.dtype for n, m in options.items() if isinstance(m, Tensor)}
    with torch.no_grad():
        if len(kinds) > 1:
            # torch wants both of one kind; a bool mask is one of 0 and -inf.
            options = {
                n: torch.zeros(m.shape).masked_fill(m, -torch.inf)
                if isinstance(m, Tensor) and m.dtype is torch.bool
                else m
                for n, m in options.items()
            }
        expected, found = theirs(*inputs, **options), ours(*inputs, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_query_that_sees_no_key_is_torchs() -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    ours = MultiheadAttention.from_float(theirs)
    x = torch.randn(2, 3, 8)
    hidden = torch.tensor([[True, True, True], [False, True, True]])
    for needed in (False, True):
        expected, _ = theirs(x, x, x, key_padding_mask=hidden, need_weights=needed)
        found, _ = ours(x, x, x, key_padding_mask=hidden, need_weights=needed)
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_encoder_with_a_causal_mask_gives_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    other = copy.deepcopy(encoder)
    for part in other.layers:
        part.self_attn = MultiheadAttention.from_float(part.self_attn)
    x, mask = torch.randn(3, 6, 16), nn.Transformer.generate_square_subsequent_mask(6)
    with torch.no_grad():
        torch.testing.assert_close(
            other(x, mask=mask, is_causal=True), encoder(x, mask=mask, is_causal=True)
        )


def test_a_stack_that_would_make_nested_tensors_calls_the_module() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    encoder.eval()
    other = copy.deepcopy(encoder)
    for part in other.layers:
        part.self_attn = MultiheadAttention.from_float(part.self_attn)
    x, hidden = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    encoder.use_nested_tensor = False
    with torch.inference_mode():
        expected = encoder(x, src_key_padding_mask=hidden)
        found = other(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found, expected)


def test_training_drops_weights_and_has_gradients() -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, 16)
    first, second = attention(x, x, x)[0], attention(x, x, x)[0]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x, x, x, is_causal=True), "attn_mask: expected the causal mask"),
        (lambda m, x: m(x[..., :3], x, x), "query: expected shape"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(2, 2)), "attn_mask: expected shape"),
        (
            lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.int64)),
            "key_padding_mask: expected bool",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(FastrecError, match=message):
        call(MultiheadAttention(8, 2, batch_first=True), torch.zeros(2, 4, 8))


def test_bad_constructions() -> None:
    with pytest.raises(ArgumentError, match="embed_dim: expected a multiple"):
        MultiheadAttention(9, 2)
    with pytest.raises(ArgumentError, match="add_zero_attn: expected False"):
        MultiheadAttention(8, 2, add_zero_attn=True)
    with pytest.raises(ArgumentError, match="add_bias_kv: expected False"):
        MultiheadAttention.from_float(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    with pytest.raises(DtypeError, match="MultiheadAttention"):
        MultiheadAttention.from_float(nn.Linear(2, 2))  # type: ignore[arg-type]

"""Recorded attention maps: their divergence by the kernel is that of the written-out maps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrec.compress import AttentionMapKL
from fastrec.compress.distillation import Forward, map_divergence
from fastrec.errors import FastrecError
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.models import record_attention
from fastrec.models.attention import KeyMask, SelfAttention
from fastrec.nn import WindowSparseAttention
from fastrec.nn.attention_map import AttentionMap

WIDTH, HEADS, ROWS = 16, 2, 11
LOG2 = AttentionPattern(1, "log2")
needs_kernel = pytest.mark.skipif(reason_missing() is not None, reason="nothing compiled")


def recorded(
    pattern: AttentionPattern | None, lengths: Tensor | None, *, causal: bool = False, seed: int = 0
) -> tuple[AttentionMap, torch.nn.Module]:
    """The map of one attention layer on fixed inputs; pattern None is the dense layer."""
    torch.manual_seed(seed)
    x = torch.randn(3, ROWS, WIDTH)
    if pattern is None:
        layer: Any = SelfAttention(WIDTH, HEADS)
        mask = None
        if lengths is not None:
            beyond = torch.arange(ROWS) >= lengths[:, None]
            mask = KeyMask((beyond * -30000.0)[:, None, None], lengths)
        call = (x, mask, causal)
    else:
        layer, call = WindowSparseAttention(WIDTH, HEADS, pattern=pattern), (x,)
    with record_attention(layer) as maps:
        layer(*call) if pattern is None else layer(*call, lengths=lengths)
    return maps[0], layer


def gradients(value: Tensor, layer: torch.nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(
        value, list(layer.parameters()), retain_graph=True, allow_unused=True
    )
    return [g for g in found if g is not None]


LENGTHS = torch.tensor([ROWS, 4, 1])
CAUSAL = dataclasses.replace(LOG2, causal=True)


@needs_kernel
@pytest.mark.parametrize(
    ("student", "teacher", "causal", "lengths"),
    [
        (None, None, False, LENGTHS),
        (None, None, False, None),
        (LOG2, None, False, LENGTHS),
        (LOG2, LOG2, False, LENGTHS),
        (CAUSAL, None, True, None),
        (CAUSAL, CAUSAL, False, None),
        (CAUSAL, None, False, LENGTHS),
    ],
)
def test_the_kernels_value_and_gradients_are_those_of_the_maps(
    student: AttentionPattern | None,
    teacher: AttentionPattern | None,
    causal: bool,
    lengths: Tensor | None,
) -> None:
    # A dense causal layer takes no mask beside it: rows are left-aligned.
    own, layer = recorded(student, lengths, causal=causal and student is None)
    guide, _ = recorded(teacher, None if causal else lengths, causal=causal, seed=1)
    with torch.no_grad():
        target = guide.weights()
    value = own.divergence(guide, lengths)
    assert value is not None
    expected = map_divergence(own.weights(), target, lengths)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    found, wanted = gradients(value, layer), gradients(expected, layer)
    assert len(found) == len(wanted) > 0
    for ours, torchs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-7, rtol=1e-4)


@needs_kernel
def test_causal_maps_count_the_rows_before_a_length() -> None:
    """SASRec's maps: no mask, since left-aligned rows see nothing beyond their length."""
    own, _ = recorded(None, None, causal=True)
    guide, _ = recorded(None, None, causal=True, seed=1)
    value = own.divergence(guide, LENGTHS)
    assert value is not None
    torch.testing.assert_close(value, map_divergence(own.weights(), guide.weights(), LENGTHS))


@needs_kernel
def test_the_loss_writes_down_no_map_of_self_attention() -> None:
    def refuse() -> Tensor:
        raise AssertionError("an L x L map was computed")

    maps = [
        dataclasses.replace(recorded(LOG2, LENGTHS, seed=seed)[0], make_weights=refuse)
        for seed in (0, 1)
    ]
    scores = torch.zeros(3, 2)
    value = AttentionMapKL()(Forward(scores, maps[:1], LENGTHS), Forward(scores, maps[1:], LENGTHS))
    assert value > 0


def test_maps_that_the_kernel_cannot_take_are_computed_in_torch() -> None:
    own, _ = recorded(LOG2, LENGTHS)
    dense, _ = recorded(None, LENGTHS, seed=1)
    others = {
        "heads": dataclasses.replace(dense, q=dense.q[:, :1], k=dense.k[:, :1]),
        "float64": dataclasses.replace(dense, q=dense.q.double()),
        "a teacher that sees less": recorded(AttentionPattern(1, "none"), LENGTHS)[0],
        "a mask": dataclasses.replace(dense, pattern=None),
        "other lengths": dataclasses.replace(dense, lengths=LENGTHS.flip(0)),
        "no lengths": dataclasses.replace(dense, lengths=None),
    }
    for what, teacher in others.items():
        assert own.divergence(teacher, LENGTHS) is None, what
    scores = torch.zeros(3, 2)
    value = AttentionMapKL()(
        Forward(scores, [own], LENGTHS), Forward(scores, [others["no lengths"]], LENGTHS)
    )
    torch.testing.assert_close(value, map_divergence(own.weights(), dense.weights(), LENGTHS))
    plain = AttentionMapKL()(
        Forward(scores, [own.weights()], LENGTHS), Forward(scores, [dense.weights()], LENGTHS)
    )
    torch.testing.assert_close(plain, value)


def test_a_mask_of_any_shape_is_in_the_recorded_weights() -> None:
    layer = WindowSparseAttention(WIDTH, HEADS, pattern=LOG2).eval()
    x, hidden = torch.randn(3, ROWS, WIDTH), torch.zeros(3, ROWS, dtype=torch.bool)
    hidden[:, 4] = True
    with record_attention(layer) as maps:
        _, weights = layer(
            x, key_padding_mask=hidden, need_weights=True, average_attn_weights=False
        )
    assert maps[0].pattern is None
    torch.testing.assert_close(maps[0].weights(), weights)


@needs_kernel
def test_a_length_out_of_range_is_refused() -> None:
    own, _ = recorded(None, None, causal=True)
    with pytest.raises(FastrecError, match="lengths"):
        own.divergence(own, torch.tensor([ROWS + 1, 1, 1]))

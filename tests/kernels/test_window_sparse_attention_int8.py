"""``window_sparse_attention_int8``: fuzz, accuracy, bad input, compilation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import AttentionPattern, kernels
from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels import window_sparse_attention_int8
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.pattern_tables import encoded


def available() -> list[str]:
    return [] if reason_missing() else kernels.available_isas()


SPEC = kernels.registry()["window_sparse_attention_int8"]
PATTERN = AttentionPattern(2, "log2")
SCALES = {"q_scale": 0.02, "k_scale": 0.02}


# Those with a kernel of their own.
ISAS = [name for name in ("scalar", "avx2", "avx512vnni") if name in available()]


def bytes_of(*shape: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> torch.Tensor:
    low = 0 if dtype == torch.uint8 else -128
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, low + 256, shape, generator=generator, dtype=dtype)


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch, heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    length, dims = draw(st.integers(0, 90)), draw(st.integers(1, 70))
    distances = st.lists(st.integers(1, 100), max_size=6)
    offsets = draw(
        st.sampled_from(["none", "log2", "strided:16", "strided:5"])
        | distances
        | st.lists(distances, min_size=heads, max_size=heads)
    )
    pattern = AttentionPattern(draw(st.integers(0, 40)), offsets, draw(st.booleans()))
    seed = draw(st.integers(0, 1000))
    q_dtype = draw(st.sampled_from([torch.uint8, torch.int8]))
    layout = draw(st.sampled_from(["plain", "merged", "sliced"]))

    def tensor(seed: int, dtype: torch.dtype) -> torch.Tensor:
        if layout == "merged":
            return bytes_of(batch, length, heads, dims, dtype=dtype, seed=seed).transpose(1, 2)
        if layout == "sliced":
            return bytes_of(batch, heads, length, 2 * dims, dtype=dtype, seed=seed)[..., ::2]
        return bytes_of(batch, heads, length, dims, dtype=dtype, seed=seed)

    q, k, v = tensor(seed, q_dtype), tensor(seed + 1, torch.int8), tensor(seed + 2, torch.int8)
    kwargs: dict[str, Any] = {"q_scale": draw(st.sampled_from([1e-4, 0.01, 3.0])), "k_scale": 0.02}
    if q_dtype == torch.uint8:
        kwargs["q_zero_point"] = draw(st.sampled_from([0, 3, 128, 255]))
    if draw(st.booleans()):
        kwargs["lengths"] = torch.tensor(
            [draw(st.integers(0, length)) for _ in range(batch)], dtype=torch.int64
        )
    if draw(st.booleans()):
        kwargs["v_scale"] = 0.3
    else:
        v = v.float() * 0.01
        for b, valid in enumerate(kwargs.get("lengths", ())):
            v[b, :, valid:] = torch.nan
    if draw(st.booleans()):
        kwargs |= {"out": "uint8", "out_scale": 0.01, "out_zero_point": draw(st.integers(0, 255))}
    return (q, k, v, pattern), kwargs


@pytest.mark.parametrize("isa", ISAS)
@given(call=calls())
@settings(max_examples=60, deadline=None)
def test_any_call_is_the_reference_to_the_last_bit(isa: str, call: Any) -> None:
    args, kwargs = call
    with kernels.force_isa(isa):
        SPEC.compare(window_sparse_attention_int8(*args, **kwargs), args, kwargs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dims", [64, 256])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_extreme_integers_stay_exact(isa: str, dims: int, zero_point: int) -> None:
    """All products of one sign, as large as they get: 16-bit saturation or overflow would show."""
    k = torch.full((1, 1, 200, dims), -128, dtype=torch.int8)
    k[:, :, ::3] = 127
    q = torch.full((1, 1, 200, dims), 255 - zero_point, dtype=torch.uint8)
    v = torch.full((1, 1, 200, dims), -128, dtype=torch.int8)
    args = (q, k, v, AttentionPattern(200))
    # Scores differ by up to 255 * 255 * 256: a scale that leaves several weights above 0.
    kwargs = {"q_scale": 1e-7, "k_scale": 1.0, "q_zero_point": zero_point, "v_scale": 1.0}
    with kernels.force_isa(isa):
        SPEC.compare(window_sparse_attention_int8(*args, **kwargs), args, kwargs)


def test_agrees_with_float_attention() -> None:
    """Against fp64 on the same integers: what is left is the 8 bits of the weights.

    With the largest weight as 1, a weight w is off by at most e = 0.5 / 255 + 1.1e-4 w (step and
    cubic). A quotient sum(w v) / sum(w) then moves by at most 2 max|v| sum(e) / sum(w), and
    1 / sum(w) is the softmax of the largest.
    """
    length, dims = 300, 32
    q, k, v = (bytes_of(2, 2, length, dims, seed=s) for s in range(3))
    pattern = AttentionPattern(16)
    got = window_sparse_attention_int8(q, k, v, pattern, q_scale=0.002, k_scale=0.005, v_scale=0.01)
    scores = (q.double() * 0.002) @ (k.double() * 0.005).transpose(-1, -2) * dims**-0.5
    mask = pattern.mask(length)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    exact = weights @ (v.double() * 0.01)
    step = mask.sum(-1) * (0.5 / 255) * weights.amax(-1)
    allowed = 2 * 1.28 * (step + 1.1e-4) + 1e-6  # and fp32's rounding
    assert bool(((got - exact).abs() <= allowed[..., None]).all())


def test_dynamic_range_of_the_values_is_that_of_the_valid_ones() -> None:
    q, k = bytes_of(1, 1, 8, 4), bytes_of(1, 1, 8, 4)
    v = torch.ones(1, 1, 8, 4)
    v[:, :, 5:] = 1000
    got = window_sparse_attention_int8(q, k, v, PATTERN, **SCALES, lengths=torch.tensor([5]))
    assert float((got - 1).abs().max()) < 1e-6


def test_rows_without_keys_and_zero_values_are_zero() -> None:
    q, k = bytes_of(2, 1, 40, 4), bytes_of(2, 1, 40, 4)
    lengths = torch.tensor([0, 3])
    v = torch.ones(2, 1, 40, 4)
    got = window_sparse_attention_int8(
        q, k, v, AttentionPattern(2, "none"), **SCALES, lengths=lengths
    )
    assert not got[0].any()
    assert not got[1, :, 5:].any()
    assert bool((got[1, :, :5] != 0).all())
    assert not window_sparse_attention_int8(q, k, v * 0, PATTERN, **SCALES).any()


def cut(starts: list[int], *tensors: torch.Tensor) -> list[list[torch.Tensor]]:
    """Jagged [T, H, D] into sequences [1, H, L, D]."""
    return [
        [x[begin:end].transpose(0, 1)[None] for x in tensors]
        for begin, end in itertools.pairwise(starts)
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("out", [None, "uint8"])
def test_a_jagged_batch_is_its_sequences(isa: str, dtype: torch.dtype, out: str | None) -> None:
    starts = [0, 0, 1, 130, 147, 400, 400]
    q, k, v = bytes_of(400, 3, 3, 20).unbind(1)
    pattern = AttentionPattern(3, [[5, 17, 150], [128], []])
    kwargs: dict[str, Any] = dict(SCALES)
    if out:
        kwargs |= {"out": out, "out_scale": 0.01, "out_zero_point": 100}
    scales = torch.rand(len(starts) - 1, 3)
    rows = torch.tensor(starts, dtype=dtype)
    with kernels.force_isa(isa):
        bytewise = window_sparse_attention_int8(
            q, k, v, pattern, **kwargs, v_scale=scales, cu_seqlens=rows
        )
        floats = window_sparse_attention_int8(q, k, v * 0.1, pattern, **kwargs, cu_seqlens=rows)
        assert bytewise.is_contiguous()
        for b, one in enumerate(cut(starts, q, k, v, v * 0.1, bytewise, floats)):
            got = window_sparse_attention_int8(
                *one[:3], pattern, **kwargs, v_scale=scales[b : b + 1]
            )
            assert torch.equal(got, one[4])
            assert torch.equal(
                window_sparse_attention_int8(one[0], one[1], one[3], pattern, **kwargs), one[5]
            )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("starts", "error", "text"),
    [
        (torch.tensor([0, 9]), ArgumentError, "rising from 0 to T = 10, got 9 at 1"),
        (torch.tensor([1, 10]), ArgumentError, "got 1 at 0"),
        (torch.tensor([0, 6, 4, 10]), ArgumentError, "got 4 at 2"),
        (torch.tensor([0, 11, 10]), ArgumentError, "got 11 at 1"),
        (torch.tensor([0, -(2**62), 10]), ArgumentError, "at 1"),
        (torch.tensor([0]), ArgumentError, "got 0 at 0"),
        (torch.tensor([[0, 10]]), ShapeError, "cu_seqlens"),
        (torch.tensor([0.0, 10]), DtypeError, "cu_seqlens"),
    ],
)
def test_bad_starts_are_named(backend: str, starts: Any, error: type, text: str) -> None:
    if backend == "cpu" and reason_missing():
        pytest.skip(str(reason_missing()))
    q, v = bytes_of(10, 2, 8), torch.ones(10, 2, 8)
    with pytest.raises(error, match=text):
        window_sparse_attention_int8(q, q, v, PATTERN, **SCALES, cu_seqlens=starts, backend=backend)


def test_starts_exclude_lengths_and_batches() -> None:
    q, v = bytes_of(10, 2, 8), torch.ones(10, 2, 8)
    starts = torch.tensor([0, 10])
    with pytest.raises(ArgumentError, match="lengths: expected None where cu_seqlens is given"):
        window_sparse_attention_int8(
            q, q, v, PATTERN, **SCALES, cu_seqlens=starts, lengths=torch.tensor([1])
        )
    with pytest.raises(ShapeError, match=r"q: expected shape \[B, H, L, D\]"):
        window_sparse_attention_int8(q, q, v, PATTERN, **SCALES)
    with pytest.raises(ShapeError, match=r"q: expected shape \[T, H, D\]"):
        window_sparse_attention_int8(
            q[None], q[None], v[None], PATTERN, **SCALES, cu_seqlens=starts
        )


GOOD = {"q": bytes_of(2, 2, 6, 8), "k": bytes_of(2, 2, 6, 8), "v": torch.ones(2, 2, 6, 8)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": GOOD["v"]}, DtypeError, r"q: expected torch.uint8 or torch.int8, got torch.float32"),
        ({"k": GOOD["k"].short()}, DtypeError, "k: expected torch.int8 or torch.uint8"),
        ({"v": GOOD["v"].double()}, DtypeError, "v: expected torch.float32 or torch.int8"),
        ({"q": GOOD["q"][0]}, ShapeError, r"q: expected shape \[B, H, L, D\]"),
        ({"k": GOOD["k"][:, :1]}, ShapeError, "k: expected q's shape"),
        ({"k": GOOD["k"][..., 1:]}, ShapeError, "k: expected q's shape"),
        ({"k": GOOD["k"][:, :, 1:]}, ShapeError, "v: expected k's shape"),
        ({"pattern": 3}, DtypeError, "pattern: expected an AttentionPattern, got int"),
        ({"pattern": AttentionPattern(1, [[1]])}, ShapeError, "pattern: expected offsets of 2"),
        ({"q_scale": 0.0}, ArgumentError, "q_scale: expected a finite number > 0"),
        ({"k_scale": float("nan")}, ArgumentError, "k_scale: expected a finite number > 0"),
        ({"q_scale": 1e35}, ArgumentError, "q_scale: expected q_scale"),
        ({"scale": -1.0}, ArgumentError, "scale: expected a finite number >= 0"),
        ({"q_zero_point": 4}, ArgumentError, "q_zero_point: expected None with an int8 q"),
        ({"v_scale": 1.0}, ArgumentError, "v_scale: expected None with a float v"),
        ({"v": GOOD["k"]}, ArgumentError, "v_scale: expected a number or"),
        ({"v": GOOD["k"], "v_scale": "wide"}, ArgumentError, "v_scale: expected finite numbers"),
        ({"v": GOOD["k"], "v_scale": torch.ones(2)}, ShapeError, r"v_scale: expected shape \[2, 2"),
        (
            {"v": GOOD["k"], "v_scale": torch.full((2, 2), torch.inf)},
            ArgumentError,
            "v_scale: expected finite numbers",
        ),
        ({"v": GOOD["v"] * torch.inf}, ArgumentError, "v: expected finite numbers"),
        ({"v": GOOD["v"] * torch.nan}, ArgumentError, "v: expected finite numbers"),
        ({"lengths": torch.tensor([3, 7])}, ArgumentError, r"lengths: expected values in \[0, 6\]"),
        ({"lengths": torch.tensor([-1, 2])}, ArgumentError, r"lengths: .* got -1"),
        ({"lengths": torch.tensor([3])}, ShapeError, r"lengths: expected shape \[2\]"),
        ({"lengths": torch.tensor([3.0, 1.0])}, DtypeError, "lengths: expected int64"),
        ({"out": "int4"}, ArgumentError, "out: expected None or 'uint8'"),
        ({"out": "uint8", "out_scale": 1.0}, ArgumentError, "out_zero_point: expected a number"),
        (
            {"out": "uint8", "out_scale": 1.0, "out_zero_point": 256},
            ArgumentError,
            r"out_zero_point: expected an integer in \[0, 255\]",
        ),
        (
            {"out": "uint8", "out_scale": -1.0, "out_zero_point": 5},
            ArgumentError,
            "out_scale: expected a finite number > 0",
        ),
        ({"v": GOOD["k"], "v_scale": -2.0}, ArgumentError, "v_scale: expected finite numbers"),
        ({"out_scale": 1.0}, ArgumentError, "out_scale: expected given with out='uint8' only"),
    ],
)
def test_bad_input_is_named(backend: str, change: Any, error: type, text: str) -> None:
    if backend == "cpu" and (reason := reason_missing()):
        pytest.skip(reason)
    call = {**GOOD, "pattern": PATTERN, **SCALES, **change}
    with pytest.raises(error, match=text):
        window_sparse_attention_int8(**call, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_more_keys_than_the_sums_hold_are_refused(backend: str) -> None:
    x = torch.zeros(1, 1, 65_600, 1, dtype=torch.int8)
    with pytest.raises(
        ArgumentError, match="pattern: expected at most 65536 keys a query, got 656"
    ):
        window_sparse_attention_int8(
            x, x, x, AttentionPattern(70_000), **SCALES, v_scale=1.0, backend=backend
        )


def op_call(**change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    jagged = "cu_seqlens" in change
    q, k, v = (x.flatten(0, 1) if jagged else x for x in GOOD.values())
    args = (q, k, v, encoded(PATTERN), 0.1, 0.1, 0)
    return args, change


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lengths": torch.tensor([2, 6])},
        {"cu_seqlens": torch.tensor([0, 1, 4])},
        {"out_scale": 0.1, "out_zero_point": 3},
    ],
)
def test_torch_op_is_registered_as_torch_wants_it(change: dict[str, Any]) -> None:
    args, kwargs = op_call(**change)
    torch.library.opcheck(torch.ops.fastrec.window_sparse_attention_int8, args, kwargs)


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_compiles_as_one_graph(dynamic: bool | None) -> None:
    def model(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return window_sparse_attention_int8(q, q, v * 2, PATTERN, **SCALES) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (6, 9, 40):
        q, v = bytes_of(2, 2, length, 8), torch.ones(2, 2, length, 8)
        assert torch.equal(compiled(q, v), model(q, v))

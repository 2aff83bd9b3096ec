"""``window_sparse_attention``: the definition, gradients, the torch op, bad input, and fuzz."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import AttentionPattern, kernels
from fastrec.errors import ArgumentError, BackendError, DtypeError, ShapeError
from fastrec.kernels import window_sparse_attention
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.window_sparse_attention import SPEC
from fastrec.kernels.window_sparse_attention._spec import decode, encode
from fastrec.kernels.window_sparse_attention.reference import window_sparse_attention_reference


def own_kernels() -> list[str]:
    """The instruction sets that have a kernel of their own here."""
    if reason_missing():
        return ["none"]
    isas = []
    for isa in kernels.available_isas():
        with kernels.force_isa(isa):
            isas += [isa] * (SPEC.kernel_isa() == isa)
    return isas


ISAS = own_kernels()
PATTERNS = (
    AttentionPattern(0, "none"),
    AttentionPattern(3, "log2"),
    AttentionPattern(2, "strided:5", causal=True),
    AttentionPattern(1, ((9, 30), (4, 17), ()), causal=True),
    AttentionPattern(2, "random", num_random=4, max_length=40, seed=5),
    AttentionPattern(100, "none"),
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_the_reference_is_masked_dense_attention(pattern: AttentionPattern, length: int) -> None:
    q, k, v = draw(3, 2, 3, length, 5).double()
    valid = torch.tensor([length, length // 2])
    seen = pattern.mask(length, heads=3)[None] & (torch.arange(length) < valid[:, None, None, None])
    scores = (q @ k.mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num() @ v
    out, lse = window_sparse_attention_reference(
        q, k, v, pattern, lengths=valid, scale=0.3, return_lse=True
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def gradients(
    inputs: Any, pattern: Any, kwargs: Any, d_out: torch.Tensor, d_lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = window_sparse_attention(*leaves, pattern, return_lse=True, **kwargs)
    # The log-sum-exp of a row that sees nothing is -inf, and has no gradient.
    return torch.autograd.grad(
        (out, lse), leaves, (d_out.to(out.dtype), d_lse.to(lse.dtype)), materialize_grads=True
    )


def check_gradients(inputs: Any, pattern: AttentionPattern, kwargs: Any) -> None:
    """Gradients off those of the fp64 formula by at most the bound derived here.

    A weight is off by e = 2 (D + 4) roundings of S = |scale| max|q| max|k| relative to itself (as
    in ``samples.compare``; the rounding of lse is the + 2), d_out . v and delta by D + 2 roundings
    of G = |d_out| |v|, and a gradient sums n pairs: at most
    n (e + D + n + 8) roundings of |scale| * (2 G + |d_lse|) * max(|q|, |k|) for dq and dk, of
    |d_out| for dv, n the rows that meet one. A 16-bit gradient adds half a spacing of its own, and
    delta is computed from an out of that precision: G times its rounding.
    """
    q, k, v = inputs
    dtype = q.dtype
    d_out, d_lse = draw(*q.shape, seed=7).to(dtype), draw(*q.shape[:-1], seed=8)
    got = gradients(inputs, pattern, kwargs, d_out, d_lse)
    doubles = [x.double() for x in inputs]
    exact = gradients(doubles, pattern, kwargs, d_out.double(), d_lse.double())
    largest_q, largest_k, largest_v, largest_d = (
        x.double().nan_to_num().norm(dim=-1).max().item() if x.numel() else 0.0
        for x in (q, k, v, d_out)
    )
    dims, length = q.shape[-1], q.shape[-2] if "cu_seqlens" not in kwargs else len(q)
    scale = abs(kwargs.get("scale", dims**-0.5))
    most = max(len(pattern.distances(length, h)) for h in range(q.shape[1]))
    n = min(2 * (pattern.window + most) + 1, length)
    error = 2 * (dims + 4) * scale * largest_q * largest_k + dims + n + 8
    slope = 2 * largest_d * largest_v + d_lse.abs().max().item() if d_lse.numel() else 0.0
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, x, expected in zip(("dq", "dk", "dv"), got, exact, strict=True):
        assert x.dtype == dtype
        assert x.shape == expected.shape
        if not x.numel():
            continue
        assert not bool(x.isnan().any()), name
        size = {
            "dq": scale * slope * largest_k,
            "dk": scale * slope * largest_q,
            "dv": largest_d,
        }[name]
        bound = n * error * 2**-24 * size + rounding * (expected.abs().max().item() + n * size)
        off = (x.double() - expected).abs().max().item()
        assert off <= bound, f"{name}: {off:.3g} > {bound:.3g}"
        # The bound is the worst case of n errors alike; a wrong pair or factor stands out by far.
        if dtype == torch.float32:
            torch.testing.assert_close(x.double(), expected, rtol=1e-3, atol=1e-4 * max(1.0, size))


@pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_of_the_kernels(isa: str, dtype: torch.dtype, pattern: AttentionPattern) -> None:
    with kernels.force_isa(isa):
        for batch, length, dims, lengths in ((2, 37, 17, None), (3, 50, 32, (0, 21, 50))):
            inputs = draw(3, batch, 3, length, dims, dtype=dtype).unbind(0)
            kwargs: dict[str, Any] = {}
            if lengths:
                for b, valid in enumerate(lengths):
                    inputs[1][b, :, valid:] = inputs[2][b, :, valid:] = torch.nan
                kwargs = {"lengths": torch.tensor(lengths), "scale": -0.4}
                # The fp64 formula cuts these keys away; their gradients are zero in both.
            check_gradients(inputs, pattern, kwargs)
        jagged = draw(70, 3, 3, 40, dtype=dtype).unbind(1)
        starts = torch.tensor([0, 1, 1, 50, 70], dtype=torch.int32)
        check_gradients(jagged, pattern, {"cu_seqlens": starts})


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    length=st.integers(0, 90),
    dims=st.sampled_from([1, 2, 5, 8, 15, 16, 17, 32, 40, 64, 70]),
    window=st.integers(0, 100),
    offsets=st.sampled_from(["none", "log2", "strided:1", "strided:9"])
    | st.lists(st.integers(1, 95), max_size=6),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["plain", "merged", "strided", "jagged"]),
    isa=st.sampled_from(ISAS),
    data=st.data(),
)
def test_any_shape_pattern_and_layout(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    window: int,
    offsets: Any,
    causal: bool,
    dtype: torch.dtype,
    layout: str,
    isa: str,
    data: st.DataObject,
) -> None:
    pattern = AttentionPattern(window, offsets, causal)
    kwargs: dict[str, Any] = {}
    if layout == "jagged":
        sizes = data.draw(st.lists(st.integers(0, length), max_size=4))
        starts = torch.tensor([0, *sizes]).cumsum(0)
        kwargs["cu_seqlens"] = starts
        inputs = draw(sum(sizes), 3, heads, dims, dtype=dtype).unbind(1)
    else:
        if layout == "plain":
            inputs = draw(3, batch, heads, length, dims, dtype=dtype).unbind(0)
        elif layout == "merged":
            merged = draw(batch, length, 3, heads, dims, dtype=dtype)
            inputs = merged.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            inputs = draw(3, batch, heads, dims, length, dtype=dtype).mT.unbind(0)
        if data.draw(st.booleans()):
            valid = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
            kwargs["lengths"] = torch.tensor(valid, dtype=torch.int64)
            for b, n in enumerate(valid):
                inputs[1][b, :, n:] = inputs[2][b, :, n:] = torch.nan
    if reason_missing():
        SPEC.compare(
            window_sparse_attention(*inputs, pattern, **kwargs), (*inputs, pattern), kwargs
        )
        return
    with kernels.force_isa(isa):
        SPEC.compare(
            window_sparse_attention(*inputs, pattern, **kwargs), (*inputs, pattern), kwargs
        )
        check_gradients(inputs, pattern, kwargs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_see_nothing(backend: str) -> None:
    q, k, v = draw(3, 2, 1, 40, 8)
    out, lse = window_sparse_attention(
        q,
        k,
        v,
        AttentionPattern(2, "none"),
        lengths=torch.tensor([0, 5]),
        return_lse=True,
        backend=backend,
    )
    assert lse.dtype == torch.float32
    assert bool((out[0] == 0).all())
    assert bool((lse[0] == -torch.inf).all())
    # Row 6 still sees key 4, row 7 sees none of the five.
    assert bool((out[1, 0, 6] == v[1, 0, 4]).all())
    assert bool((out[1, :, 7:] == 0).all())
    assert bool((lse[1, :, 7:] == -torch.inf).all())
    assert bool(lse[1, :, :7].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
def test_what_lies_around_the_rows_is_never_read(isa: str) -> None:
    if reason_missing():
        pytest.skip(str(reason_missing()))
    # Rows amid NaNs, before, behind and between: a single one read would spread.
    field = torch.full((3, 5, 40, 23), torch.nan)
    q, k, v = (field[i, 1:4, 3:36, 5:18][None] for i in range(3))
    for x, seed in ((q, 1), (k, 2), (v, 3)):
        x.copy_(draw(*x.shape, seed=seed))
    k[..., 30:, :] = v[..., 30:, :] = torch.nan
    kwargs = {"lengths": torch.tensor([30])}
    pattern = AttentionPattern(2, (4, 16, 20))
    with kernels.force_isa(isa):
        args = (q, k, v, pattern)
        SPEC.compare(window_sparse_attention(*args, **kwargs), args, kwargs)
        check_gradients((q, k, v), pattern, kwargs)


def test_a_hundred_thousand_rows() -> None:
    """A buffer of L x L would be 40 GB."""
    q, k, v = draw(3, 1, 1, 100_000, 8)
    pattern = AttentionPattern(2, "log2")
    args = (q, k, v, pattern)
    SPEC.compare(window_sparse_attention(*args), args, {})
    q.requires_grad_()
    (dq,) = torch.autograd.grad(window_sparse_attention(q, k, v, pattern).sum(), q)
    # The gradient of a row depends on its own keys alone: the last one's, on a short copy of them.
    rows = [99_999 - d for d in (0, 1, 2, *pattern.distances(100_000))]
    last = q.detach()[0, 0, -1].double().requires_grad_()
    weights = (k[0, 0, rows].double() @ last * 8**-0.5).softmax(0)
    (expected,) = torch.autograd.grad((weights @ v[0, 0, rows].double()).sum(), last)
    torch.testing.assert_close(dq[0, 0, -1].double(), expected, rtol=1e-4, atol=1e-5)


def test_extreme_scores_stay_finite() -> None:
    q = torch.full((1, 1, 3, 4), 1e4)
    k = torch.tensor([1e4, -1e4, 0.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4).contiguous()
    v = torch.arange(12.0).reshape(1, 1, 3, 4)
    out = window_sparse_attention(q, k, v, AttentionPattern(4))
    assert torch.equal(out, v[:, :, :1].expand(1, 1, 3, 4))


def test_a_nan_among_the_valid_keys_is_not_hidden() -> None:
    q, k, v = draw(3, 1, 1, 60, 8)
    k[0, 0, 30] = torch.nan
    out = window_sparse_attention(q, k, v, AttentionPattern(3, "none"))
    assert bool(out[0, 0, 27:34].isnan().all())
    assert not bool(out[0, 0, :27].isnan().any() | out[0, 0, 34:].isnan().any())


def test_gradients_do_not_depend_on_the_threads() -> None:
    if reason_missing():
        pytest.skip(str(reason_missing()))
    inputs = draw(3, 1, 3, 900, 24).unbind(0)
    d_out, d_lse = draw(1, 3, 900, 24, seed=1), draw(1, 3, 900, seed=2)
    before = kernels.num_threads()
    try:
        results = []
        for threads in (1, 64, 64):
            kernels.set_num_threads(threads)
            results.append(gradients(inputs, AttentionPattern(16), {}, d_out, d_lse))
    finally:
        kernels.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS[1:4], ids=str)
def test_gradcheck(pattern: AttentionPattern) -> None:
    inputs = [x.double().requires_grad_() for x in draw(3, 1, 3, 9, 3)]

    def both(q: Any, k: Any, v: Any) -> Any:
        return window_sparse_attention(q, k, v, pattern, scale=0.7, return_lse=True)

    def ragged(q: Any, k: Any, v: Any) -> Any:
        lengths = torch.tensor([6])
        return window_sparse_attention(q, k, v, pattern, lengths=lengths)

    def jagged(q: Any, k: Any, v: Any) -> Any:
        starts = torch.tensor([0, 4, 9])
        args = (x[0].transpose(0, 1) for x in (q, k, v))
        return window_sparse_attention(*args, pattern, cu_seqlens=starts, return_lse=True)

    for function in (both, ragged, jagged):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("case", ["plain", "lengths", "jagged", "float64"])
def test_the_torch_op_passes_opcheck(case: str) -> None:
    dtype = torch.float64 if case == "float64" else torch.float32
    q, k, v = (x.to(dtype).requires_grad_() for x in draw(3, 2, 3, 20, 6))
    lengths, starts = (torch.tensor([3, 20]), None) if case == "lengths" else (None, None)
    if case == "jagged":
        q, k, v = (x[0].detach().transpose(0, 1).requires_grad_() for x in (q, k, v))
        starts = torch.tensor([0, 5, 20])
    args = (q, k, v, 3, "log2", False, lengths, starts, 0.5)
    torch.library.opcheck(torch.ops.fastrec.window_sparse_attention.default, args)
    with torch.no_grad():
        out, lse = torch.ops.fastrec.window_sparse_attention(*args)
    backward_args = (torch.ones_like(out), None, q.detach(), k.detach(), v.detach(), out, lse)
    torch.library.opcheck(
        torch.ops.fastrec.window_sparse_attention_backward.default, backward_args + args[3:]
    )


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in draw(3, 1, 1, 5, 4))
    out = window_sparse_attention(q, k, v, AttentionPattern(2))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


class Attention(torch.nn.Module):
    def __init__(self, pattern: AttentionPattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        return window_sparse_attention(q * 2, k, v, self.pattern)


@pytest.mark.parametrize("pattern", PATTERNS[1:5], ids=str)
def test_compile_with_any_length(pattern: AttentionPattern) -> None:
    torch._dynamo.reset()
    module = Attention(pattern)
    run = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33, 70):
        qkv = draw(3, 2, 3, length, 8).requires_grad_()
        assert torch.equal(run(qkv), module(qkv))
        ours = torch.autograd.grad(run(qkv).square().sum(), qkv)[0]
        assert torch.equal(ours, torch.autograd.grad(module(qkv).square().sum(), qkv)[0])


def test_export_keeps_the_length_dynamic() -> None:
    module = Attention(AttentionPattern(3, "log2"))
    length = torch.export.Dim("length", min=2, max=10_000)
    program = torch.export.export(
        module, (draw(3, 2, 3, 20, 8),), dynamic_shapes=({3: length},), strict=False
    )
    longer = draw(3, 2, 3, 77, 8)
    assert torch.equal(program.module()(longer), module(longer))


@given(
    st.builds(AttentionPattern, st.integers(0, 9), st.sampled_from(["none", "log2", "strided:3"]))
    | st.builds(
        AttentionPattern, st.integers(0, 9), st.lists(st.integers(1, 99), max_size=4), st.booleans()
    )
    | st.builds(
        AttentionPattern,
        st.integers(0, 9),
        st.lists(st.lists(st.integers(1, 99), max_size=4), min_size=1, max_size=3),
    )
    | st.just(PATTERNS[4])
)
def test_a_pattern_survives_its_spelling(pattern: AttentionPattern) -> None:
    assert decode(pattern.window, encode(pattern), pattern.causal) == pattern


Q, J = torch.zeros(2, 3, 4, 8), torch.zeros(10, 3, 8)
LOG2 = AttentionPattern(2)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((Q[0], Q, Q), {}, ShapeError, r"q: expected shape \[B, H, L, D\]"),
        ((Q, Q[:1], Q), {}, ShapeError, "k: expected q's shape"),
        ((Q, Q, Q[..., :4]), {}, ShapeError, "v: expected q's shape"),
        ((Q, Q.double(), Q), {}, DtypeError, "k: expected q's dtype"),
        ((Q.int(), Q.int(), Q.int()), {}, DtypeError, "q: expected float32"),
        ((Q[..., :0],) * 3, {}, ShapeError, "q: .*1 to 256 dimensions"),
        ((Q[:, :0],) * 3, {}, ShapeError, "q: expected at least one head"),
        ((torch.zeros(1, 1, 2, 257),) * 3, {}, ShapeError, "1 to 256 dimensions"),
        (
            (Q, Q, Q),
            {"lengths": torch.tensor([1, 5])},
            ArgumentError,
            r"lengths: .*\[0, 4\], got 5",
        ),
        ((Q, Q, Q), {"lengths": torch.tensor([-1, 2])}, ArgumentError, "lengths: .*got -1"),
        ((Q, Q, Q), {"lengths": torch.tensor([1])}, ShapeError, r"lengths: expected shape \[2\]"),
        ((Q, Q, Q), {"lengths": torch.tensor([1.0, 2.0])}, DtypeError, "lengths: expected int64"),
        ((Q, Q, Q), {"scale": float("nan")}, ArgumentError, "scale: expected a finite number"),
        ((Q, Q, Q), {"cu_seqlens": torch.tensor([0, 2])}, ShapeError, r"q: expected .*\[T, H, D\]"),
        ((J, J, J), {"cu_seqlens": torch.tensor([0, 9])}, ArgumentError, "rising from 0 to T = 10"),
        ((J, J, J), {"cu_seqlens": torch.tensor([1, 10])}, ArgumentError, "got 1 at 0"),
        ((J, J, J), {"cu_seqlens": torch.tensor([0, 6, 4, 10])}, ArgumentError, "got 4 at 2"),
        ((J, J, J), {"cu_seqlens": torch.tensor([0, 11, 10])}, ArgumentError, "got 11 at 1"),
        ((J, J, J), {"cu_seqlens": torch.tensor([0])}, ArgumentError, "got 0 at 0"),
        ((J, J, J), {"cu_seqlens": torch.tensor([[0, 10]])}, ShapeError, "cu_seqlens"),
        ((J, J, J), {"cu_seqlens": torch.tensor([0.0, 10])}, DtypeError, "cu_seqlens"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(
    args: Any, kwargs: dict[str, Any], error: type[Exception], text: str, backend: str
) -> None:
    with pytest.raises(error, match=text):
        window_sparse_attention(*args, LOG2, **kwargs, backend=backend)


def test_bad_patterns_and_backends() -> None:
    with pytest.raises(ShapeError, match="pattern: expected offsets for q's 3 heads, got 2 lists"):
        window_sparse_attention(Q, Q, Q, AttentionPattern(1, [[3], [5]]))
    with pytest.raises(DtypeError, match="pattern: expected an AttentionPattern, got str"):
        window_sparse_attention(Q, Q, Q, "log2")  # type: ignore[arg-type]
    starts = torch.tensor([0, 10])
    with pytest.raises(ArgumentError, match="lengths: expected None where cu_seqlens is given"):
        window_sparse_attention(J, J, J, LOG2, lengths=torch.tensor([1]), cu_seqlens=starts)
    double = Q.double()
    with pytest.raises(BackendError, match="'cpu' can't run: it computes in float32"):
        window_sparse_attention(double, double, double, LOG2, backend="cpu")

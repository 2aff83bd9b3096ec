"""``attention_map_kl``: its definition, gradients, bad input, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import AttentionPattern, kernels
from fastrec.errors import ArgumentError, BackendError, DtypeError, ShapeError
from fastrec.kernels import attention_map_kl
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.attention_map_kl.reference import divergence_and_gradients
from fastrec.kernels.pattern_tables import encoded


def available() -> list[str]:
    return [] if reason_missing() else kernels.available_isas()


SPEC = kernels.registry()["attention_map_kl"]
# Those with a kernel of their own.
ISAS = [name for name in ("scalar", "avx2", "avx512") if name in available()]
PATTERN = AttentionPattern(2, "log2")
NAMES = ("teacher_q", "teacher_k", "student_q", "student_k")


def maps(
    *shape: int, teacher_dims: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dims = shape
    widths = (teacher_dims, teacher_dims, dims, dims)
    return tuple(
        torch.randn(batch, heads, length, width, generator=generator).to(dtype) for width in widths
    )


def dense(
    tq: torch.Tensor,
    tk: torch.Tensor,
    sq: torch.Tensor,
    sk: torch.Tensor,
    pattern: AttentionPattern,
    lengths: list[int],
    teacher_causal: bool,
) -> torch.Tensor:
    """The documented definition with L x L maps: the teacher's dense softmax, cut, renormalised."""
    batch, heads, length, _ = sq.shape
    sums = torch.zeros(batch, heads, dtype=torch.float64)
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        mask = pattern.mask(length, heads)[:, :n, :n]
        scores = tq[b, :, :n].double() @ tk[b, :, :n].double().transpose(1, 2)
        scores = scores * tq.shape[-1] ** -0.5
        if teacher_causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        t = scores.softmax(-1) * mask
        t = t / t.sum(-1, keepdim=True)
        s = sq[b, :, :n].double() @ sk[b, :, :n].double().transpose(1, 2) * sq.shape[-1] ** -0.5
        log_s = s.masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(t == 0, 0.0)
        sums[b] = (torch.xlogy(t, t) - t * log_s).sum((-1, -2))
    return sums


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch, heads = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    length, dims = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    distances = st.lists(st.integers(1, 80), max_size=6)
    offsets = draw(
        st.sampled_from(["none", "log2", "strided:16", "strided:5"])
        | distances
        | st.lists(distances, min_size=heads, max_size=heads)
    )
    pattern = AttentionPattern(draw(st.integers(0, 40)), offsets, draw(st.booleans()))
    tensors = maps(
        batch,
        heads,
        length,
        dims,
        teacher_dims=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 999)),
    )
    if draw(st.booleans()):  # other strides
        tensors = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    kwargs: dict[str, Any] = {
        "teacher_causal": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    if draw(st.booleans()):
        valid = [draw(st.integers(0, length)) for _ in range(batch)]
        kwargs["lengths"] = torch.tensor(valid, dtype=torch.int64)
        for b, n in enumerate(valid):
            for x in tensors:
                x[b, :, n:] = torch.nan
    return (*tensors, pattern), kwargs


def check_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Kernel gradients of the sums against fp64.

    A probability is off by at most r roundings of itself, r = 2 (D + 4) of the scores' size for
    each map (see samples.compare); they add up to 1 over a row's n keys, whose products add n
    more: 2 (r + n) roundings of scale * max|k| for dq. A key is seen by at most n rows: n times as
    many of max|q| for dk.
    """
    tq, tk, sq, sk, pattern = args
    sq, sk = sq.clone().requires_grad_(), sk.clone().requires_grad_()
    options = {k: v for k, v in kwargs.items() if k != "reduction"}
    sums = attention_map_kl(tq, tk, sq, sk, pattern, **options, reduction="none")
    weight = torch.linspace(0.5, 2.0, max(sums.numel(), 1))[: sums.numel()].reshape(sums.shape)
    sums.backward(weight)
    wide = [x.detach().double() for x in (tq, tk, sq, sk)]
    _, dq, dk = divergence_and_gradients(*wide, pattern, **options)
    size = [x.nan_to_num().norm(dim=-1).max().item() if x.numel() else 0.0 for x in wide]
    t_scale, s_scale = tq.shape[-1] ** -0.5, sq.shape[-1] ** -0.5
    roundings = 2 * (tq.shape[-1] + 4) * t_scale * size[0] * size[1] + 4
    roundings += 2 * (sq.shape[-1] + 4) * s_scale * size[2] * size[3]
    length = sq.shape[2]
    keys = min(length, 2 * pattern.window + 1)
    keys += 2 * max(len(pattern.distances(length, h)) for h in range(sq.shape[1]))
    unit = 2 * 2 * (roundings + keys) * 2**-24 * s_scale
    for got, exact, allowed in (
        (sq.grad, dq, unit * size[3]),
        (sk.grad, dk, unit * size[2] * keys),
    ):
        assert got is not None
        expected = exact * weight[:, :, None, None].double()
        assert not got.numel() or float((got - expected).abs().max()) <= allowed


@pytest.mark.parametrize("isa", ISAS)
@given(call=calls())
@settings(max_examples=25, deadline=None)
def test_any_call_agrees_with_the_reference(isa: str, call: Any) -> None:
    args, kwargs = call
    with kernels.force_isa(isa):
        SPEC.compare(attention_map_kl(*args, **kwargs), args, kwargs)
        check_gradients(args, kwargs)


@given(call=calls())
@settings(max_examples=25, deadline=None)
def test_reference_is_the_documented_definition(call: Any) -> None:
    args, kwargs = call
    length = args[0].shape[2]
    lengths = kwargs.get("lengths", torch.full((len(args[0]),), length)).tolist()
    sums = dense(*args, lengths, kwargs["teacher_causal"])
    got = SPEC.reference(*args, **kwargs | {"reduction": "none"})
    torch.testing.assert_close(got, sums, rtol=1e-10, atol=1e-12 * length)
    rows = max(sum(lengths) * args[0].shape[1], 1)
    mean = SPEC.reference(*args, **kwargs | {"reduction": "mean"})
    torch.testing.assert_close(mean, sums.sum() / rows, rtol=1e-10, atol=1e-12 * length)


@pytest.mark.parametrize("teacher_causal", [False, True])
def test_gradients_in_closed_form_are_those_of_autograd(teacher_causal: bool) -> None:
    tq, tk, sq, sk = maps(2, 2, 40, 8, dtype=torch.float64)
    sq.requires_grad_()
    sk.requires_grad_()
    lengths = torch.tensor([40, 23])
    sums, dq, dk = divergence_and_gradients(
        tq, tk, sq, sk, PATTERN, lengths=lengths, teacher_causal=teacher_causal
    )
    by_autograd = torch.autograd.grad(sums.sum(), (sq, sk))
    torch.testing.assert_close(by_autograd, (dq, dk), rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    tq, tk, sq, sk = maps(2, 1, 7, 3, dtype=torch.float64)
    lengths = torch.tensor([7, 4])

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return attention_map_kl(tq, tk, q, k, PATTERN, lengths=lengths, reduction="none")

    torch.autograd.gradcheck(loss, (sq.requires_grad_(), sk.requires_grad_()))


def test_equal_maps_cost_nothing_and_the_teacher_is_a_constant() -> None:
    tq, tk, _, _ = maps(1, 2, 50, 8, teacher_dims=8)
    tq.requires_grad_()
    sq, sk = tq.detach().clone().requires_grad_(), tk.clone().requires_grad_()
    loss = attention_map_kl(tq, tk, sq, sk, PATTERN)
    loss.backward()
    # Both maps take the same steps on the same numbers.
    assert loss.item() == 0
    assert tq.grad is None
    assert sq.grad is not None
    assert not sq.grad.any()


@pytest.mark.parametrize("isa", ISAS)
def test_threads_and_repeats_do_not_change_gradients(isa: str) -> None:
    tq, tk, sq, sk = maps(4, 4, 300, 32)
    before = kernels.num_threads()
    results = []
    try:
        with kernels.force_isa(isa):
            for threads in (1, 64, 64):
                kernels.set_num_threads(threads)
                q, k = sq.clone().requires_grad_(), sk.clone().requires_grad_()
                attention_map_kl(tq, tk, q, k, AttentionPattern(4)).backward()
                results.append((q.grad, k.grad))
    finally:
        kernels.set_num_threads(before)
    for q_grad, k_grad in results[1:]:
        assert torch.equal(q_grad, results[0][0])
        assert torch.equal(k_grad, results[0][1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("which", range(4))
def test_a_nan_is_not_hidden(isa: str, which: int) -> None:
    tensors = maps(1, 1, 40, 8)
    tensors[which][0, 0, 20, 3] = torch.nan
    with kernels.force_isa(isa):
        assert attention_map_kl(*tensors, PATTERN).isnan()


@pytest.mark.parametrize("isa", ISAS)
def test_peaked_teachers_stay_finite(isa: str) -> None:
    """Probabilities that underflow to 0, on either side."""
    tq, tk, sq, sk = maps(1, 1, 40, 8)
    with kernels.force_isa(isa):
        for scales in ({"teacher_scale": 500.0}, {"student_scale": 500.0}):
            args, kwargs = (tq, tk, sq, sk, PATTERN), scales
            SPEC.compare(attention_map_kl(*args, **kwargs), args, kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in maps(2, 2, 30, 8)]
    tensors[2].requires_grad_()
    loss = attention_map_kl(*tensors, PATTERN)
    assert torch.equal(loss, attention_map_kl(*(x.float() for x in tensors), PATTERN))
    loss.backward()
    assert tensors[2].grad is not None
    assert tensors[2].grad.dtype == dtype


def test_float64_is_left_to_the_reference() -> None:
    tensors = maps(1, 1, 9, 4, dtype=torch.float64)
    assert attention_map_kl(*tensors, PATTERN).dtype == torch.float64
    with pytest.raises(BackendError, match="float32, the input is float64"):
        attention_map_kl(*tensors, PATTERN, backend="cpu")


def test_a_second_derivative_is_refused() -> None:
    tq, tk, sq, sk = maps(1, 1, 9, 4)
    (first,) = torch.autograd.grad(
        attention_map_kl(tq, tk, sq.requires_grad_(), sk, PATTERN), sq, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()
    squared = attention_map_kl(tq, tk, sq, sk, PATTERN) ** 2
    with pytest.raises(BackendError, match="differentiated once"):
        torch.autograd.grad(squared, sq, create_graph=True)


GOOD = dict(
    zip(("teacher_q", "teacher_k", "student_q", "student_k"), maps(2, 2, 6, 8), strict=True)
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"teacher_q": GOOD["teacher_q"].int()}, DtypeError, "teacher_q: expected float32"),
        ({"student_k": GOOD["student_k"][0]}, ShapeError, r"student_k: expected shape \[B, H, L"),
        (
            {"teacher_k": GOOD["student_k"]},
            ShapeError,
            r"teacher_k: expected shape \[2, 2, 6, 6\], got \[2, 2, 6, 8\]",
        ),
        ({"student_k": GOOD["student_k"][:1]}, ShapeError, "student_k: expected shape"),
        ({"student_q": GOOD["student_q"][..., :0]}, ShapeError, "student_q: expected at least one"),
        ({"pattern": None}, DtypeError, "pattern: expected an AttentionPattern"),
        ({"pattern": AttentionPattern(1, [[2]])}, ShapeError, "pattern: expected offsets of 2"),
        ({"reduction": "max"}, ArgumentError, "reduction: expected 'mean', 'sum' or 'none'"),
        ({"student_scale": float("inf")}, ArgumentError, "student_scale: expected a finite"),
        ({"lengths": torch.tensor([1, 7])}, ArgumentError, r"lengths: expected values in \[0, 6\]"),
        ({"lengths": torch.tensor([1])}, ShapeError, r"lengths: expected shape \[2\]"),
        ({"lengths": torch.tensor([1.0, 2.0])}, DtypeError, "lengths: expected int64"),
    ],
)
def test_bad_input_is_named(backend: str, change: Any, error: type, text: str) -> None:
    if backend == "cpu" and (reason := reason_missing()):
        pytest.skip(reason)
    with pytest.raises(error, match=text):
        attention_map_kl(**{**GOOD, "pattern": PATTERN, **change}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 9])])
def test_torch_op_is_registered_as_torch_wants_it(
    dtype: torch.dtype, lengths: torch.Tensor | None
) -> None:
    tq, tk, sq, sk = maps(2, 2, 9, 5, dtype=dtype)
    args = (tq, tk, sq.requires_grad_(), sk.requires_grad_(), encoded(PATTERN), True, lengths)
    torch.library.opcheck(torch.ops.fastrec.attention_map_kl, args)


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_compiles_as_one_graph_with_its_backward(dynamic: bool | None) -> None:
    def loss(tq: Any, tk: Any, sq: Any, sk: Any) -> torch.Tensor:
        return attention_map_kl(tq, tk, sq * 2, sk, PATTERN) * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (6, 9, 40):
        tq, tk, sq, sk = maps(2, 2, length, 8)
        grads = []
        for call in (loss, compiled):
            q, k = sq.clone().requires_grad_(), sk.clone().requires_grad_()
            call(tq, tk, q, k).backward()
            grads.append((q.grad, k.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])

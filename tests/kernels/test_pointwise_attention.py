"""``pointwise_attention``: the definition, gradients, the torch op, bad input, and fuzz."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, DtypeError, ShapeError
from fastrec.kernels import pointwise_attention
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.pointwise_attention import SPEC, log_time_edges
from fastrec.kernels.pointwise_attention.buckets import MAX_TIME, buckets_of

TABLES = ("position_bias", "time_bias")


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
compiled_only = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(name: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The contract sample whose name holds these words."""
    words = name.split()
    found = next(s for s in SPEC.samples() if all(word in s.name for word in words))
    return found.make()


def spelled_out(q: Any, k: Any, v: Any, kwargs: dict[str, Any], b: int, rows: int) -> torch.Tensor:
    """Sequence b of a padded batch, pair by pair, from the public documentation."""
    heads, length = q.shape[1], q.shape[2]
    out = torch.zeros(heads, length, v.shape[-1], dtype=torch.float64)
    targets = kwargs.get("targets", 0)
    history = rows - int(targets[b] if isinstance(targets, torch.Tensor) else targets)
    for h in range(heads):
        for i in range(rows):
            for j in range(rows):
                candidate = i != j and j >= history
                later = kwargs.get("causal", True) and j > i
                if candidate or later:
                    continue
                score = float(q[b, h, i].double() @ k[b, h, j].double())
                score *= kwargs.get("scale", q.shape[-1] ** -0.5)
                if (table := kwargs.get("position_bias")) is not None:
                    row = table[h] if table.dim() == 2 else table
                    middle = len(row) // 2
                    score += float(row[middle + max(-middle, min(middle, j - i))])
                if (table := kwargs.get("time_bias")) is not None:
                    row = table[h] if table.dim() == 2 else table
                    asked = kwargs.get("query_timestamps", kwargs["timestamps"])
                    apart = abs(int(asked[b, i]) - int(kwargs["timestamps"][b, j]))
                    bucket = int(math.log(max(apart, 1)) / 0.301 + 1e-12)
                    score += float(row[min(bucket, len(row) - 1)])
                weight = score / (1 + math.exp(-score)) / kwargs.get("norm_length", length)
                out[h, i] += weight * v[b, h, j].double()
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_the_documented_formula(causal: bool) -> None:
    args, kwargs = case(f"L40-D16-16 lengths P20 causal={causal}")
    kwargs["query_timestamps"] = kwargs["timestamps"].roll(-1, 1)
    got = SPEC.reference(*args, **kwargs)
    for b, rows in enumerate(kwargs["lengths"].tolist()):
        torch.testing.assert_close(got[b], spelled_out(*args, kwargs, b, rows))
    args, kwargs = case(f"L75-D20-12 targets40 by_head causal={causal}")
    for b in range(2):
        expected = spelled_out(*args, kwargs, b, 75)
        torch.testing.assert_close(SPEC.reference(*args, **kwargs)[b], expected)


def test_the_published_form() -> None:
    """HSTU's research code: a square of position biases, the next event's time, no scale."""
    length, buckets = 20, 128
    q, k, v = draw(3, 1, 2, length, 8, dtype=torch.float64)
    position, time = draw(2 * length - 1, seed=1), draw(buckets + 1, seed=2)
    times = (3 * draw(1, length, seed=3)).exp().long().cumsum(1)
    square = torch.nn.functional.pad(position, [0, length]).repeat(length)
    square = square[:-length].reshape(length, 3 * length - 2)
    square = square[:, length - 1 : 1 - length]
    later = torch.cat([times, times[:, -1:]], 1)
    apart = (later[:, 1:, None] - later[:, None, :-1]).abs().clamp(min=1)
    bucket = (apart.log() / 0.301).long().clamp(0, buckets)
    weights = torch.nn.functional.silu(q @ k.mT + square + time[bucket][:, None]) / length
    expected = weights.tril() @ v
    got = pointwise_attention(
        q,
        k,
        v,
        position_bias=position,
        time_bias=time,
        time_edges=log_time_edges(buckets + 1),
        timestamps=times,
        query_timestamps=later[:, 1:],
        scale=1.0,
    )
    torch.testing.assert_close(got, expected)


def test_edges_are_the_smallest_of_their_bucket() -> None:
    edges = log_time_edges(129).tolist()
    assert edges == sorted(edges)
    assert edges[-1] == MAX_TIME
    for n, edge in enumerate(edges[:100], 1):
        assert math.log(edge) >= n * 0.301 - 1e-12
        assert edge == 1 or math.log(edge - 1) < n * 0.301
    assert log_time_edges(1).shape == (0,)
    with pytest.raises(ArgumentError, match="buckets: expected an integer in"):
        log_time_edges(0)
    with pytest.raises(ArgumentError, match="step: expected a finite number > 0"):
        log_time_edges(4, 0.0)


def gradients(args: Any, kwargs: dict[str, Any], d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of q, k, v and the tables that there are."""
    names = [name for name in TABLES if name in kwargs]
    leaves = [x.detach().requires_grad_() for x in (*args, *(kwargs[name] for name in names))]
    tables = dict(zip(names, leaves[3:], strict=True))
    out = pointwise_attention(*leaves[:3], **kwargs | tables)
    return torch.autograd.grad(out, leaves, d_out.to(out.dtype), materialize_grads=True)


def check_gradients(args: Any, kwargs: dict[str, Any]) -> None:
    """Gradients off those of the fp64 formula by at most the bound derived here.

    A score is off by e = (D + 4) roundings of S (as in ``samples.compare``); SiLU's slope is at
    most 1.1 and changes by at most 0.5 times that, plus 12 roundings of its own. Its factor,
    d_out . v, is below G = |d_out| |v| and off by Dv roundings of it. So the gradient of a score is
    off by r = e S / 2 + 12 + 1.1 Dv roundings of G / norm. dq and dk sum n of them times |scale|
    |k| or |q|, a table's entry at most all pairs, a sum of m terms with m roundings; a term of dv
    is a weight, (1.1 e + 8) S + 1 roundings off, times |d_out|. 16-bit results add half a spacing.
    """
    q, k, v = args
    dtype = q.dtype
    d_out = draw(*v.shape, seed=7).to(dtype)
    got = gradients(args, kwargs, d_out)
    doubles = tuple(x.double() for x in args)
    wide = kwargs | {name: kwargs[name].double() for name in TABLES if name in kwargs}
    exact = gradients(doubles, wide, d_out.double())
    if not q.numel():
        assert all(not bool(x.any()) for x in got)
        return
    size_q, size_k, size_v, size_d = (
        x.double().nan_to_num().norm(dim=-1).max().item() for x in (q, k, v, d_out)
    )
    scale = abs(kwargs.get("scale", q.shape[-1] ** -0.5))
    size = scale * size_q * size_k
    size += sum(kwargs[name].abs().max().item() for name in TABLES if name in kwargs)
    n = len(q) if "cu_seqlens" in kwargs else q.shape[2]
    norm = kwargs.get("norm_length", n)
    e = (q.shape[-1] + 4) * size
    slope = (e / 2 + 12 + 1.1 * v.shape[-1]) * size_d * size_v / norm
    bounds = {"dq": n * slope * scale * size_k, "dk": n * slope * scale * size_q}
    bounds["dv"] = n * ((1.1 * e + 8 * size) + 1 + n * size) * size_d / norm
    pairs = (n if "cu_seqlens" in kwargs else n * q.shape[0]) * n * q.shape[1]
    bounds |= {name: pairs * slope for name in TABLES if name in kwargs}
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for (name, bound), x, expected in zip(bounds.items(), got, exact, strict=True):
        assert x.dtype == (kwargs[name].dtype if name in TABLES else dtype)
        assert x.shape == expected.shape
        assert not bool(x.isnan().any()), name
        own = 0.0 if name in TABLES else rounding
        largest = expected.abs().max().item()
        off = (x.double() - expected).abs().max().item()
        # The worst case of all errors alike; n more of them for the sum's own roundings.
        allowed = 2 * n * bound * 2**-24 + own * largest + 2**-24
        assert off <= allowed, f"{name}: {off:.3g} > {allowed:.3g}"
        # A wrong pair or factor stands out by far.
        near = 1e-4 + own
        torch.testing.assert_close(x.double(), expected, rtol=10 * near, atol=near * largest + near)


GRADIENT_CASES = [s for s in SPEC.samples() if s.macs < 500_000 and "scale=300" not in s.name]


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_of_the_kernels(isa: str) -> None:
    with kernels.force_isa(isa):
        for sample in GRADIENT_CASES:
            args, kwargs = sample.make()
            try:
                check_gradients(args, kwargs)
            except AssertionError as error:
                raise AssertionError(sample.name) from error


@pytest.mark.parametrize("sample", GRADIENT_CASES[::7], ids=lambda sample: sample.name)
def test_the_references_gradients_are_those_of_autograd(sample: Any) -> None:
    args, kwargs = sample.make()
    args = tuple(x.nan_to_num().double().requires_grad_() for x in args)
    d_out = draw(*args[2].shape).double()
    got = gradients(args, kwargs, d_out)
    expected = torch.autograd.grad(SPEC.reference(*args, **kwargs), args, d_out)
    torch.testing.assert_close(got[:3], expected)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    length=st.integers(0, 90),
    dims=st.sampled_from([1, 2, 5, 15, 16, 17, 32, 40, 64, 70]),
    value_dims=st.sampled_from([1, 8, 16, 33, 64]),
    causal=st.booleans(),
    positions=st.sampled_from([0, 1, 7, 100]),
    buckets=st.sampled_from([0, 1, 30, 200]),
    by_head=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    jagged=st.booleans(),
    isa=st.sampled_from(ISAS),
    data=st.data(),
)
def test_any_call_agrees_with_the_reference(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    value_dims: int,
    causal: bool,
    positions: int,
    buckets: int,
    by_head: bool,
    dtype: torch.dtype,
    jagged: bool,
    isa: str,
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    kwargs: dict[str, Any] = {"causal": causal}
    kwargs["targets"] = torch.tensor([data.draw(st.integers(0, n)) for n in sizes]).long()
    rows: tuple[int, ...] = (sum(sizes),) if jagged else (batch, length)
    if jagged:
        kwargs |= {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0), "norm_length": 50}
        args = tuple(draw(*rows, heads, d, seed=d, dtype=dtype) for d in (dims, dims, value_dims))
    else:
        kwargs["lengths"] = torch.tensor(sizes).long()
        args = tuple(
            draw(batch, heads, length, d, seed=d, dtype=dtype) for d in (dims, dims, value_dims)
        )
        for b, n in enumerate(sizes):
            for x in args:
                x[b, :, n:] = torch.nan
    if positions:
        shape = (heads, 2 * positions - 1) if by_head else (2 * positions - 1,)
        kwargs["position_bias"] = draw(*shape, seed=3)
    if buckets:
        kwargs["time_bias"] = draw(*((heads, buckets) if by_head else (buckets,)), seed=4)
        steps = data.draw(st.sampled_from([0.01, 0.301, 3.0]))
        kwargs["time_edges"] = log_time_edges(buckets, steps)
        # Any order, and differences that int64 cannot hold.
        spread = data.draw(st.sampled_from([3, 10_000, 2**62]))
        generator = torch.Generator().manual_seed(1)
        for name in ("timestamps", "query_timestamps"):
            kwargs[name] = torch.randint(-spread, spread, rows, generator=generator)
    if reason_missing():
        SPEC.compare(pointwise_attention(*args, **kwargs), args, kwargs)
        return
    with kernels.force_isa(isa):
        SPEC.compare(pointwise_attention(*args, **kwargs), args, kwargs)
        check_gradients(args, kwargs)


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
def test_every_bucket_is_the_references(isa: str) -> None:
    """Differences at each edge and next to it, with a table that tells its entries apart."""
    ragged = torch.tensor([1, 1, 2, 17, 18, 19, 20, 2**20, 2**20 + 1, 2**53 - 1, 2**53])
    for edges in (log_time_edges(129), log_time_edges(4096, 0.009), ragged):
        near = torch.cat([edges - 1, edges, edges + 1, torch.tensor([0, 2**62])])
        near = near[torch.linspace(0, len(near) - 1, min(len(near), 400)).long()]
        length = len(near)
        q = torch.zeros(1, 1, length, 1)
        table = 100.0 + torch.arange(len(edges) + 1.0)
        zeros = torch.zeros(1, length, dtype=torch.int64)
        with kernels.force_isa(isa):
            out = pointwise_attention(
                q,
                q,
                torch.ones(1, 1, length, 1),
                time_bias=table,
                time_edges=edges,
                timestamps=zeros,
                query_timestamps=near[None],
                norm_length=1,
                targets=length - 1,
            )
        # SiLU of numbers so large is the number; target i sees the first row and itself.
        expected = 2 * table[buckets_of(near, zeros[0], edges)][:, 0]
        assert torch.equal(out[0, 0, 1:, 0], expected[1:])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_jagged_batch_is_the_padded_one(backend: str) -> None:
    if backend == "cpu" and reason_missing():
        pytest.skip(str(reason_missing()))
    sizes = [0, 1, 50, 17]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    args, kwargs = case("L40-D16-16 lengths P20 causal=True")
    kwargs |= {"lengths": torch.tensor(sizes), "targets": torch.tensor([0, 1, 9, 0])}
    args = tuple(draw(4, 2, 50, d, seed=n) for n, d in enumerate((16, 16, 5)))
    kwargs["timestamps"] = torch.arange(200).reshape(4, 50) ** 2
    kwargs["norm_length"] = 50
    padded = pointwise_attention(*args, **kwargs, backend=backend)
    flat = [torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(sizes)]) for x in args]
    times = torch.cat([kwargs["timestamps"][b, :n] for b, n in enumerate(sizes)])
    del kwargs["lengths"]
    for dtype in (torch.int64, torch.int32):
        options = kwargs | {"cu_seqlens": starts.to(dtype), "timestamps": times}
        jagged = pointwise_attention(*flat, **options, backend=backend)
        for b, n in enumerate(sizes):
            assert torch.equal(jagged[starts[b] : starts[b + 1]].transpose(0, 1), padded[b, :, :n])
            assert not bool(padded[b, :, n:].any())


@pytest.mark.parametrize("causal", [True, False])
def test_a_candidate_is_scored_alone(causal: bool) -> None:
    """Whatever other candidates there are, and history rows do not see them at all."""
    q, k, v = draw(3, 1, 2, 45, 8)
    options: dict[str, Any] = {"norm_length": 45, "causal": causal, "scale": 0.5}
    together = pointwise_attention(q, k, v, targets=5, **options)
    for n in range(5):
        rows = [*range(40), 40 + n]
        alone = pointwise_attention(
            *(x[:, :, rows] for x in (q, k, v)), targets=torch.tensor([1]), **options
        )
        torch.testing.assert_close(alone[:, :, 40], together[:, :, 40 + n])
        torch.testing.assert_close(alone[:, :, :40], together[:, :, :40])


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
def test_what_lies_around_the_rows_is_never_read(isa: str) -> None:
    # Rows amid NaNs, before, behind and between: a single one read would spread.
    field = torch.full((3, 5, 40, 23), torch.nan)
    args = tuple(field[i, 1:4, 3:36, 5:18][None] for i in range(3))
    for seed, x in enumerate(args):
        x.copy_(draw(*x.shape, seed=seed))
        x[..., 30:, :] = torch.nan
    kwargs = {"lengths": torch.tensor([30]), "position_bias": draw(9)}
    with kernels.force_isa(isa):
        SPEC.compare(pointwise_attention(*args, **kwargs), args, kwargs)
        check_gradients(args, kwargs)


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_scores_stay_finite(isa: str) -> None:
    q = torch.full((1, 1, 3, 4), 1e4)
    k = torch.tensor([1e4, -1e4, 0.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4).contiguous()
    v = torch.ones(1, 1, 3, 4)
    with kernels.force_isa(isa):
        out = pointwise_attention(q, k, v, scale=1.0, norm_length=1)
        assert torch.equal(out, torch.full_like(out, 4e8))
        for x in gradients((q, k, v), {"scale": 1.0}, torch.ones_like(v)):
            assert bool(x.isfinite().all())


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("which", range(3))
def test_a_nan_among_the_rows_is_not_hidden(isa: str, which: int) -> None:
    """In v it may spread to rows that do not see it, as in torch: 0 * NaN."""
    args = draw(3, 1, 1, 60, 8)
    args[which][0, 0, 30] = torch.nan
    with kernels.force_isa(isa):
        out = pointwise_attention(*args)
    assert bool(out[0, 0, 30].isnan().all())
    assert which == 2 or not bool(out[0, 0, :30].isnan().any())


@compiled_only
def test_gradients_do_not_depend_on_the_threads() -> None:
    args, kwargs = case("L75-D20-12 by_head causal=True")
    args = tuple(draw(2, 3, 300, d, seed=n) for n, d in enumerate((20, 20, 12)))
    kwargs["timestamps"] = torch.arange(600).reshape(2, 300) ** 2
    before = kernels.num_threads()
    try:
        results = []
        for threads in (1, 64, 64):
            kernels.set_num_threads(threads)
            results.append(gradients(args, kwargs, draw(2, 3, 300, 12)))
    finally:
        kernels.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal: bool) -> None:
    q, k, v = (x.double().requires_grad_() for x in draw(3, 2, 2, 7, 3))
    position, time = draw(2, 5, seed=1).double(), draw(6, seed=2).double()
    times = torch.tensor([1, 2, 5, 9, 40, 300, 301]).expand(2, 7)

    def call(q: Any, k: Any, v: Any, position: Any, time: Any) -> torch.Tensor:
        return pointwise_attention(
            q,
            k,
            v,
            position_bias=position,
            time_bias=time,
            time_edges=log_time_edges(6, 1.0),
            timestamps=times,
            lengths=torch.tensor([5, 7]),
            targets=torch.tensor([2, 0]),
            causal=causal,
        )

    leaves = (q, k, v, position.requires_grad_(), time.requires_grad_())
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("name", ["L40-D16-16 lengths P20", "jagged P20", "L16-D8 P20", "L60-D8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_torch_op_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    args, kwargs = case(name)
    q, k, v = (x.nan_to_num().to(dtype).requires_grad_() for x in args)
    tables = [kwargs.get(name) for name in TABLES]
    tables = [None if x is None else x.to(dtype).requires_grad_() for x in tables]
    times = kwargs.get("timestamps")
    targets = kwargs.get("targets")
    rest = (
        *(kwargs.get("time_edges"), times, None if times is None else times + 1),
        *(kwargs.get("lengths"), kwargs.get("cu_seqlens")),
        *(targets if isinstance(targets, torch.Tensor) else None, 0.5, 40.0, True),
    )
    op = torch.ops.fastrec.pointwise_attention
    torch.library.opcheck(op.default, (q, k, v, *tables, *rest))
    inputs = [None if x is None else x.detach() for x in (q, k, v, *tables)]
    backward = torch.ops.fastrec.pointwise_attention_backward
    torch.library.opcheck(backward.default, (op(*inputs, *rest), *inputs, *rest))


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in draw(3, 1, 1, 5, 4))
    (dq,) = torch.autograd.grad(pointwise_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


def test_compiles_in_one_graph_with_its_gradients() -> None:
    args, kwargs = case("L40-D16-16 lengths P20 causal=True")
    args = tuple(x.nan_to_num().requires_grad_() for x in args)

    def loss(q: Any, k: Any, v: Any) -> torch.Tensor:
        return pointwise_attention(q, k, v, **kwargs).square().sum()

    expected = torch.autograd.grad(loss(*args), args)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*args), args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_float64_is_left_to_the_reference() -> None:
    q, k, v = draw(3, 1, 1, 9, 4, dtype=torch.float64)
    assert pointwise_attention(q, k, v).dtype == torch.float64
    with pytest.raises(BackendError, match="the input is float64"):
        pointwise_attention(q, k, v, backend="cpu")


GOOD = dict(zip("qkv", draw(3, 2, 2, 6, 8), strict=True))
TIMES: dict[str, Any] = {
    "time_bias": draw(4),
    "time_edges": torch.tensor([1, 5, 9]),
    "timestamps": torch.arange(12).reshape(2, 6),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": GOOD["q"][0]}, ShapeError, r"q: expected shape \[B, H, L, D\]"),
        ({"q": GOOD["q"].long()}, DtypeError, "q: expected float32, bfloat16"),
        ({"k": GOOD["k"][:, :1]}, ShapeError, "k: expected q's shape"),
        ({"k": GOOD["k"][..., 1:]}, ShapeError, "k: expected q's shape"),
        ({"v": GOOD["v"][:, :, 1:]}, ShapeError, "v: expected q's shape .* but for D"),
        ({"v": GOOD["v"].double()}, DtypeError, "v: expected q's dtype"),
        (
            {"v": torch.zeros(2, 2, 6, 257)},
            ShapeError,
            "v: expected at least one head and 1 to 256",
        ),
        ({"position_bias": draw(4)}, ShapeError, "position_bias: expected an odd number"),
        ({"position_bias": draw(3, 5)}, ShapeError, r"position_bias: expected shape \[2 P - 1\]"),
        ({"position_bias": torch.arange(5)}, DtypeError, "position_bias: expected a float tensor"),
        (TIMES | {"timestamps": None}, ArgumentError, "timestamps: expected a tensor with time_b"),
        (TIMES | {"time_edges": None}, ArgumentError, "time_edges: expected a tensor with time_b"),
        (TIMES | {"time_bias": None}, ArgumentError, "time_edges: expected None without time_bias"),
        (TIMES | {"time_bias": draw(5)}, ShapeError, r"time_edges: expected shape \[4\]"),
        (TIMES | {"time_bias": draw(4097)}, ShapeError, "time_bias: expected at most 4096 buckets"),
        (
            TIMES | {"time_edges": torch.tensor([1, 5, 4])},
            ArgumentError,
            r"time_edges: expected values in \[1, \d+\], none below the one before, got 4 at 2",
        ),
        (TIMES | {"time_edges": torch.tensor([0, 5, 5])}, ArgumentError, "time_edges: .* got 0 at"),
        (TIMES | {"timestamps": torch.arange(6)}, ShapeError, r"timestamps: expected shape \[2, 6"),
        (TIMES | {"timestamps": draw(2, 6)}, DtypeError, "timestamps: expected int64 or int32"),
        ({"lengths": torch.tensor([3, 7])}, ArgumentError, r"lengths: expected values in \[0, 6\]"),
        ({"lengths": torch.tensor([-1, 2])}, ArgumentError, r"lengths: .* got -1 at 0"),
        ({"lengths": torch.tensor([3])}, ShapeError, r"lengths: expected shape \[2\]"),
        ({"lengths": torch.tensor([3.0, 1.0])}, DtypeError, "lengths: expected int64"),
        ({"targets": 7}, ArgumentError, "targets: expected values from 0 to the rows of the seq"),
        ({"targets": -1}, ArgumentError, "targets: expected a number >= 0, got -1"),
        ({"targets": torch.tensor([0, 7])}, ArgumentError, "targets: .* got 7 at 1"),
        (
            {"targets": torch.tensor([2, 2]), "lengths": torch.tensor([6, 1])},
            ArgumentError,
            "targets: .* got 2 at 1",
        ),
        ({"scale": math.inf}, ArgumentError, "scale: expected a finite number"),
        ({"norm_length": 0}, ArgumentError, "norm_length: expected a finite number > 0"),
    ],
)
def test_bad_input_is_named(
    backend: str, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    if backend == "cpu" and reason_missing():
        pytest.skip(str(reason_missing()))
    with pytest.raises(error, match=text):
        pointwise_attention(**GOOD | change, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("starts", "text"),
    [
        ([0, 9], "rising from 0 to T = 10, got 9 at 1"),
        ([1, 10], "got 1 at 0"),
        ([0, 6, 4, 10], "got 4 at 2"),
        ([0, 11, 10], "got 11 at 1"),
        ([0, -(2**62), 10], "at 1"),
        ([0], "got 0 at 0"),
    ],
)
def test_bad_starts_are_named(backend: str, starts: list[int], text: str) -> None:
    if backend == "cpu" and reason_missing():
        pytest.skip(str(reason_missing()))
    x = draw(10, 2, 8)
    with pytest.raises(ArgumentError, match=text):
        pointwise_attention(
            x, x, x, cu_seqlens=torch.tensor(starts), norm_length=10, backend=backend
        )


def test_what_a_jagged_batch_needs() -> None:
    x, starts = draw(10, 2, 8), torch.tensor([0, 10])
    with pytest.raises(ArgumentError, match="norm_length: expected a number with cu_seqlens"):
        pointwise_attention(x, x, x, cu_seqlens=starts)
    with pytest.raises(ArgumentError, match="lengths: expected None where cu_seqlens is given"):
        pointwise_attention(x, x, x, cu_seqlens=starts, lengths=torch.tensor([1]), norm_length=9)
    with pytest.raises(ShapeError, match=r"cu_seqlens: expected shape"):
        pointwise_attention(x, x, x, cu_seqlens=starts[None], norm_length=9)

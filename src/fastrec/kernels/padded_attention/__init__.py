"""``padded_attention``: softmax attention over the first ``lengths[b]`` keys of each sequence.

    out[b, h, i] = sum_{j < lengths[b]} softmax_j(scale * q[b, h, i] . k[b, h, j]) v[b, h, j]

Inference only, fp32. At recommender sizes (L = 100) a library call spends its time on masks and
copies; this kernel reads strided views of a merged projection and skips padding altogether.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import check_length_values, check_lengths, length_error
from fastrec.kernels._compiled import Signature, cpu_can_run
from fastrec.kernels._registry import Backends, OpSpec, Sample, always
from fastrec.kernels._torch_op import define_op
from fastrec.kernels._views import row_view
from fastrec.kernels.padded_attention.reference import padded_attention_reference

__all__ = ["SPEC", "padded_attention"]

BACKENDS = Backends("padded_attention", {"cpu": cpu_can_run, "reference": always})


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None) -> None:
    float32, device = torch.float32, q.device
    if not (q.dtype is k.dtype is v.dtype is float32 and k.device == device == v.device):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.dtype is not float32:
                raise DtypeError(name, "float32", tensor.dtype)
            if tensor.device != device:
                raise DeviceError(name, f"q's device {device}", tensor.device)
    shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(shape) == len(k_shape) == len(v_shape) == 4:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.dim() != 4:
                raise ShapeError(name, "shape [B, H, L, D]", list(tensor.shape))
    batch, heads, _, dims = shape
    if dims == 0 or heads == 0:
        raise ShapeError("q", "at least one head and one dimension", list(shape))
    expected = (batch, heads, k_shape[2], dims)
    if k_shape != expected:
        raise ShapeError("k", f"shape {list(expected)}", list(k_shape))
    if v_shape != expected:
        raise ShapeError("v", f"shape {list(expected)}", list(v_shape))
    if lengths is not None:
        check_lengths(lengths, q, "q")


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    shape: tuple[int, ...],
    keys: int,
) -> torch.Tensor:
    """The compiled kernel on checked arguments, q of ``shape`` [B, H, Lq, D]."""
    batch, heads, queries, dims = shape
    # Unpacked here: starred arguments would cost the call as much again.
    q, (q_at, q_batch, q_head, q_row) = row_view(q)
    k, (k_at, k_batch, k_head, k_row) = row_view(k)
    v, (v_at, v_batch, v_head, v_row) = row_view(v)
    if lengths is not None:
        lengths = lengths.contiguous()
    out = torch.empty((batch, queries, heads, dims))
    bad = _compiled.native().padded_attention.run(
        q_at,
        q_batch,
        q_head,
        q_row,
        k_at,
        k_batch,
        k_head,
        k_row,
        v_at,
        v_batch,
        v_head,
        v_row,
        out.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        batch,
        queries,
        keys,
        heads,
        dims,
        scale,
    )
    if bad >= 0:
        raise length_error(lengths, bad, keys)
    return out.transpose(1, 2)


def padded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of Lq queries over the first ``lengths[b]`` of Lk keys.

    Args:
        q: float32 [B, H, Lq, D]; views of a merged projection [B, L, 3, H, D] are read in place.
        k, v: float32 [B, H, Lk, D]; what lies beyond the length is never read, NaNs included.
        lengths: int64 [B], 0 to Lk; None means Lk.
        scale: factor of the scores; None means D ** -0.5.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        float32 [B, H, Lq, D], a view of contiguous [B, Lq, H, D]; zeros where the length is 0.
        Not differentiable.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument.
        BackendError: the backend asked for can't run.
    """
    _check(q, k, v, lengths)
    shape, keys = q.shape, k.shape[2]
    scale = shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ArgumentError("scale", "a finite number", scale)
    if backend is None and q.is_cpu and BACKENDS.cpu_is_compiled:
        return _run(q, k, v, lengths, scale, shape, keys)
    if BACKENDS.choose(Signature(q.device.type), backend) == "reference":
        check_length_values(lengths, keys)
        return padded_attention_reference(q, k, v, lengths=lengths, scale=scale)
    return _run(q, k, v, lengths, scale, shape, keys)


def _fake(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


define_op(
    "padded_attention(Tensor q, Tensor k, Tensor v, *, Tensor? lengths=None, float? scale=None) "
    "-> Tensor",
    padded_attention,
    _fake,
    devices=("CPU",),
)


def sample(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dims: int,
    *,
    lengths: tuple[int, ...] | None = None,
    merged: bool = False,
    bench: bool = False,
) -> Sample:
    """One case; NaNs fill the rows beyond the lengths.

    Args:
        batch, heads, queries, keys, dims: B, H, Lq, Lk and D.
        lengths: of each sequence.
        merged: q, k and v are views of one projection.
        bench: whether the bench times it.
    """

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(queries * 1009 + keys * 31 + dims)
        if merged:
            qkv = torch.randn(batch, keys, 3, heads, dims, generator=generator)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = torch.randn(batch, heads, queries, dims, generator=generator)
            k, v = torch.randn(2, batch, heads, keys, dims, generator=generator).unbind(0)
        if lengths is None:
            return (q, k, v), {}
        for b, length in enumerate(lengths):
            k[b, :, length:] = v[b, :, length:] = torch.nan
        return (q, k, v), {"lengths": torch.tensor(lengths)}

    shape = f"B{batch}-H{heads}-Lq{queries}-Lk{keys}-D{dims}"
    used = sum(lengths) if lengths else batch * keys
    return Sample(
        name=shape + ("-lengths" if lengths else "") + ("-merged" if merged else ""),
        make=make,
        macs=2 * heads * queries * used * dims,
        bytes_moved=4 * heads * dims * (2 * batch * queries + 2 * used),
        bench=bench,
        labels={"batch": batch, "heads": heads, "queries": queries, "keys": keys, "dims": dims},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of keys and dims (16), blocks of rows (8, 64), empty sequences, strided views."""
    cases = [sample(2, 2, 3, keys, 8) for keys in (1, 15, 16, 17, 63, 64, 65, 129)]
    cases += [sample(1, 3, 5, 9, dims) for dims in (1, 15, 16, 17, 31, 32, 33, 65)]
    cases += [sample(1, 1, queries, 20, 16) for queries in (1, 7, 8, 9, 63, 64, 65, 130)]
    cases += [sample(0, 2, 3, 4, 8), sample(2, 2, 0, 4, 8), sample(2, 1, 3, 5, 4, lengths=(0, 5))]
    cases += [sample(3, 4, 40, 40, 32, lengths=(1, 23, 40), merged=m) for m in (False,)]
    cases += [sample(2, 4, 33, 33, 32, merged=True)]
    return [
        *cases,
        sample(1, 4, 100, 100, 32, merged=True, bench=True),
        sample(1, 4, 50, 100, 32, bench=True),
    ]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Error against fp64 at most twice that of the same formula in fp32 torch, plus a floor.

    The floor covers cases where torch happens to be exact (one key, few queries): weights and sum
    carry one rounding each, the product two more, so 4 * 2^-24 of the largest |v| in use. A score
    summed in another order than torch's differs by a rounding of what was summed, |q||k|; its
    exponential by as much of itself, above and below the fraction.
    """
    exact = padded_attention_reference(*args, **kwargs)
    torch_fp32 = padded_attention_reference(*args, **kwargs, dtype=torch.float32)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if not exact.numel():
        return
    largest = args[2].nan_to_num().abs().max().item() if args[2].numel() else 0.0
    q, k = (t.nan_to_num().abs().double() for t in args[:2])
    summed = (q @ k.transpose(-1, -2)).max().item() * (kwargs.get("scale") or q.shape[-1] ** -0.5)
    floor = (4 + 2 * abs(summed)) * 2**-24 * largest
    allowed = 2 * (torch_fp32 - exact).abs().max().item() + floor
    assert not bool(actual.isnan().any()), "NaN in the output"
    error = (actual - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"


SPEC = OpSpec(
    op_id="padded_attention",
    summary="softmax attention over the first lengths[b] keys of each sequence",
    function=padded_attention,
    reference=padded_attention_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)

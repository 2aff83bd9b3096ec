"""The gradients of the reference as a formula, for where torch's autograd is not at hand.

Inside a torch op nothing is recorded, so the op's own backward in fp64 (and on devices without a
kernel) computes from lse what the compiled kernels compute.
"""

from __future__ import annotations

import itertools

import torch

from fastrec.kernels.window_sparse_attention._spec import Call, Rows, decode
from fastrec.kernels.window_sparse_attention.keys import blocks
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def one_sequence(
    grads: Gradients,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
) -> None:
    """Adds to the gradients [H, L, D] of one sequence; k and v hold valid keys only."""
    heads, rows, dims = q.shape
    keys = k.shape[1]
    if keys == 0:
        return
    for h, span, key, valid in blocks(pattern, rows, heads, keys, q.device):
        keys_h, values_h = k[h][key], v[h][key]
        scores = torch.einsum("rd,rnd->rn", q[h, span], keys_h) * scale
        weights = (scores - lse[h, span, None]).exp().masked_fill(~valid, 0.0)
        d_weights = torch.einsum("rd,rnd->rn", d_out[h, span], values_h)
        d_scores = weights * (d_weights - delta[h, span, None]) * scale
        d_scores = d_scores.masked_fill(~valid, 0.0)
        grads[0][h, span] += torch.einsum("rn,rnd->rd", d_scores, keys_h)
        flat = key.flatten()
        d_keys = d_scores[..., None] * q[h, span, None]
        grads[1][h].index_add_(0, flat, d_keys.reshape(-1, dims))
        d_values = weights[..., None] * d_out[h, span, None]
        grads[2][h].index_add_(0, flat, d_values.reshape(-1, dims))


def backward(rows: Rows, call: Call) -> Gradients:
    """dq, dk and dv, zero where a key is not valid."""
    d_out, d_lse, q, k, v, out, lse = rows
    window, offsets, causal, lengths, cu_seqlens, scale = call
    pattern = decode(window, offsets, causal)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    delta = (d_out.to(dtype) * out.to(dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    grads = tuple(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    inputs = (*grads, q, k, v, d_out, delta, lse)
    if cu_seqlens is not None:
        starts = cu_seqlens.tolist()
        spans = list(itertools.pairwise(starts))
        sequences = [[x[a:b].transpose(0, 1) for x in inputs] for a, b in spans]
        valid = [b - a for a, b in spans]
    else:
        sequences = [[x[b] for x in inputs] for b in range(len(q))]
        valid = [q.shape[2]] * len(q) if lengths is None else lengths.tolist()
    for (dq, dk, dv, *rest), n in zip(sequences, valid, strict=True):
        q_s, k_s, v_s, d_out_s, delta_s, lse_s = (x.to(dtype) for x in rest)
        one_sequence(
            (dq, dk, dv), q_s, k_s[:, :n], v_s[:, :n], d_out_s, delta_s, lse_s, pattern, scale
        )
    return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype)

"""How often each kind of statement is tried."""

from __future__ import annotations

from collections.abc import Callable

from elementwise import (
    binary,
    binary_bool,
    binary_whole,
    flags,
    order,
    reduce,
    softmax,
    statistics,
    unary,
    where,
    whole,
)
from graphs import Grower, Value
from layers import attention, fourier, layer, linear, norm, product, recurrent
from moving import assigned, casts, embedding, indexed, join, positions, put, view

Op = Callable[[Grower], "Value | None"]


def unlowered(g: Grower) -> Value | None:
    """Models that no plan may hold, so far: the refusal has to be a typed one."""
    v = g.value("f")
    dim, n = g.dim(v), v.name
    forms = (
        f"torch.hypot({n}, {n})",
        f"torch.fmod({n}, 2.0)",
        f"torch.cummax({n}, {dim})[0]",
        f"{n}.prod({dim})",
        f"{n}.median({dim})[0]",
        f"{n}.unfold({dim}, 1, 1)",
        f"F.group_norm({n}, 1)",
        f"F.layer_norm({n}, {n}.shape[-2:])",
        f"{n}[{n} > 0].sum()",
        f"torch.nonzero({n}).sum()",
        f"{n} * {n}.max().item()",
        f"({n}.long() & 6) | 1",
        f"{n}.long() >> 1",
        f"torch.div({n}.long(), 4, rounding_mode='trunc')",
    )
    return g.add(g.rng.choice(forms), v)


OPS: dict[Op, float] = {
    unlowered: 0.4,
    unary: 12,
    whole: 7,
    flags: 4,
    binary: 10,
    binary_whole: 5,
    binary_bool: 3,
    where: 6,
    reduce: 10,
    statistics: 4,
    softmax: 4,
    order: 5,
    view: 16,
    join: 5,
    indexed: 6,
    put: 4,
    embedding: 5,
    linear: 7,
    product: 6,
    norm: 4,
    attention: 8,
    layer: 6,
    recurrent: 2,
    positions: 3,
    fourier: 1,
    casts: 4,
    assigned: 2,
}

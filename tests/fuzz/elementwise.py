"""Statements: elementwise ops, reductions, order."""

from __future__ import annotations

from graphs import Grower, Value

_UNARY = (
    "torch.exp({})",
    "torch.log({})",
    "torch.sqrt({})",
    "torch.rsqrt({})",
    "torch.tanh({})",
    "torch.sigmoid({})",
    "F.silu({})",
    "torch.erf({})",
    "torch.sin({})",
    "torch.cos({})",
    "torch.expm1({})",
    "torch.log1p({})",
    "torch.reciprocal({})",
    "torch.exp2({})",
    "torch.log2({})",
    "torch.log10({})",
    "F.gelu({})",
    "F.gelu({}, approximate='tanh')",
    "F.leaky_relu({}, 0.1)",
    "F.elu({})",
    "F.selu({})",
    "F.softplus({})",
    "F.mish({})",
    "F.logsigmoid({})",
    "F.softsign({})",
    "F.hardsigmoid({})",
    "F.hardswish({})",
    "{} ** 2",
    "{} ** 3",
    "{} ** -1",
    "{} ** 0.5",
    "{} ** 1.7",
    "1.5 ** {}",
    "1.0 / {}",
    "{} * 0.1 + 1.3",
)
_UNARY_EXACT = (
    "torch.floor({})",
    "torch.ceil({})",
    "torch.trunc({})",
    "torch.round({})",
    "torch.neg({})",
    "torch.abs({})",
    "F.relu({})",
    "F.relu6({})",
    "torch.sign({})",
    "torch.isnan({})",
    "torch.isinf({})",
    "torch.isfinite({})",
    "torch.nan_to_num({})",
    "torch.nan_to_num({}, nan=0.5, posinf=9.0, neginf=-9.0)",
    "F.hardtanh({})",
    "{} > 0",
    "{} <= 0.5",
    "{} == 1",
    "{} != 0",
    "{}.clamp(-1.0, 1.5)",
    "{}.clamp(min=0.5)",
    "{}.clamp(max=0.25)",
    "{}.clamp_min(1e-9)",
    "1.0 - {}",
    "{} * 2.0",
    "{} / 0.0",
    "{} * float('inf')",
    "{}.bool()",
    "{}.contiguous()",
    "torch.zeros_like({})",
    "torch.ones_like({}) * 3",
    "torch.full_like({}, -2.5)",
    "torch.logical_not({})",
)
_UNARY_WHOLE = (
    "torch.neg({})",
    "torch.abs({})",
    "torch.sign({})",
    "F.relu({})",
    "{} * 3",
    "{} - 7",
    "5 - {}",
    "{} // 3",
    "{} // -2",
    "{} % 4",
    "{} % -3",
    "torch.div({}, 4, rounding_mode='floor')",
    "{} > 2",
    "{} != 0",
    "{} == 3",
    "{} <= -1",
    "{} ** 2",
    "{}.clamp(0, 5)",
    "{}.clamp(min=1)",
    "{}.bool()",
    "{}.int()",
    "{}.long()",
    "{}.short()",
    "{}.to(self.real)",
    "{} * 65536",
    "{} * 2000000000",
    "torch.logical_not({})",
    "torch.ones_like({})",
)
_WHOLE_TO_FLOAT = ("{} / 3", "{} * 0.5", "torch.sqrt({})", "torch.exp({})", "{} + 0.25")
_BINARY = ("{} * {}", "{} / {}", "{} + {}", "{} - {}", "torch.lerp({}, {}, 0.3)")
_BINARY_EXACT = (
    "torch.maximum({}, {})",
    "torch.minimum({}, {})",
    "{} < {}",
    "{} >= {}",
    "{} == {}",
    "{} != {}",
    "torch.clamp({}, min={})",
    "torch.clamp({}, max={})",
)
_BINARY_ODD = (
    "torch.remainder({}, {})",
    "torch.div({}, {}, rounding_mode='floor')",
    "torch.div({}, {}, rounding_mode='trunc')",
    "torch.pow({}, {})",
    "F.smooth_l1_loss({}, {}, reduction='none')",
)
_BINARY_WHOLE = (
    "{} + {}",
    "{} - {}",
    "{} * {}",
    "{} // {}",
    "{} % {}",
    "torch.maximum({}, {})",
    "torch.minimum({}, {})",
    "{} < {}",
    "{} == {}",
    "{} != {}",
    "{} >= {}",
    "torch.sub({}, {}, alpha=2)",
)
_BINARY_BOOL = (
    "{} & {}",
    "{} | {}",
    "{} ^ {}",
    "{} == {}",
    "torch.logical_and({}, {})",
    "torch.logical_or({}, {})",
    "torch.logical_xor({}, {})",
    "{} * {}",
    "{} + {}",
)
_UNARY_BOOL = (
    "~{}",
    "torch.logical_not({})",
    "{}.long()",
    "{}.to(self.real)",
    "{}.int()",
    "{} * 2.5",
    "{}.cumsum(-1)",
    "{}.sum(-1)",
    "1 - {}.long()",
)


def unary(g: Grower) -> Value | None:
    v = g.value("fd")
    exact = g.chance(0.45)
    form = g.rng.choice(_UNARY_EXACT if exact else _UNARY)
    return g.add(form.format(v.name), v, exact=exact and v.kind == "f")


def whole(g: Grower) -> Value | None:
    v = g.value("in")
    if g.chance(0.15):
        return g.add(g.rng.choice(_WHOLE_TO_FLOAT).format(v.name), v)
    return g.add(g.rng.choice(_UNARY_WHOLE).format(v.name), v, exact=True)


def flags(g: Grower) -> Value | None:
    v = g.value("b")
    return g.add(g.rng.choice(_UNARY_BOOL).format(v.name), v, exact=True)


def _fits(a: Value, b: Value) -> bool:
    pairs = zip(a.shape[::-1], b.shape[::-1], strict=False)
    return all(x == y or 1 in (x, y) for x, y in pairs)


def _pair(g: Grower, kinds: str, others: str) -> tuple[Value, Value]:
    """Two values that broadcast."""
    a = g.value(kinds)
    b = g.value(others, where=lambda v: _fits(a, v))
    return a, b


def binary(g: Grower) -> Value | None:
    a, b = _pair(g, "fd", "fdin" if g.chance(0.2) else "fd")
    forms = g.rng.choice((_BINARY, _BINARY_EXACT, _BINARY_EXACT, _BINARY, _BINARY_ODD))
    exact = forms is _BINARY_EXACT and a.kind == b.kind == "f"
    return g.add(g.rng.choice(forms).format(a.name, b.name), a, b, exact=exact)


def binary_whole(g: Grower) -> Value | None:
    a, b = _pair(g, "in", "in")
    return g.add(g.rng.choice(_BINARY_WHOLE).format(a.name, b.name), a, b, exact=True)


def binary_bool(g: Grower) -> Value | None:
    a, b = _pair(g, "b", "b")
    return g.add(g.rng.choice(_BINARY_BOOL).format(a.name, b.name), a, b, exact=True)


def where(g: Grower) -> Value | None:
    mask = g.value("b")
    a = g.value("fdinb", where=lambda v: _fits(mask, v))
    b = g.value("fdin", where=lambda v: _fits(mask, v) and _fits(a, v))
    number = g.rng.choice(("0.0", "-1e9", "float('-inf')", "-1", "2", "torch.finfo(self.real).min"))
    forms = (
        "torch.where({m}, {a}, {b})",
        "torch.where({m}, {a}, {n})",
        "torch.where({m}, {n}, {a})",
        "{a}.masked_fill({m}, {n})",
        "{a}.masked_fill(~{m}, {n})",
        "{a} * {m}",
    )
    text = g.rng.choice(forms).format(m=mask.name, a=a.name, b=b.name, n=number)
    return g.add(text, mask, a, b, exact=a.kind != "d")


_REDUCE = ("sum", "mean", "amax", "amin")
_REDUCE_DIM = ("max", "min", "argmax", "argmin", "any", "all", "logsumexp")


def reduce(g: Grower) -> Value | None:
    v = g.value("fdinb" if g.chance(0.4) else "f")
    dim = g.dim(v)
    name = g.rng.choice(_REDUCE + _REDUCE_DIM)
    keep = ", keepdim=True" if g.chance(0.5) else ""
    dims = f"{dim}"
    if name in _REDUCE and v.rank > 1 and g.chance(0.3):
        other = g.dim(v)
        if other % v.rank != dim % v.rank:
            dims = f"({dim}, {other})"
    exact = name in ("amax", "amin", "max", "min", "argmax", "argmin", "any", "all")
    exact = exact or v.kind in "inb"
    text = f"{v.name}.{name}({dims}{keep})"
    if name in ("max", "min", "median"):
        text += f"[{g.rng.choice((0, 1))}]"
    if name == "mean" and v.kind in "inb":
        text, exact = f"{v.name}.to(self.real).mean({dims}{keep})", False
    return g.add(text, v, exact=exact)


def statistics(g: Grower) -> Value | None:
    v = g.value("f")
    dim = g.dim(v)
    forms = (
        "{}.var({})",
        "{}.std({}, keepdim=True)",
        "{}.var({}, unbiased=False)",
        "{}.norm(dim={})",
        "{}.norm(p=1, dim={}, keepdim=True)",
        "F.normalize({}, dim={})",
        "{}.cumsum({})",
        "{}.cumsum({}) / 2",
        "{}.count_nonzero({})",
        "torch.std_mean({}, {})[1]",
    )
    return g.add(g.rng.choice(forms).format(v.name, dim), v)


def softmax(g: Grower) -> Value | None:
    v = g.value("f")
    dim = g.dim(v)
    forms = ("torch.softmax({}, {})", "F.log_softmax({}, {})", "F.softmin({}, {})")
    return g.add(g.rng.choice(forms).format(v.name, dim), v)


def order(g: Grower) -> Value | None:
    v = g.value("fin")
    dim = g.dim(v)
    k = g.rng.randint(0, min(v.shape[dim], 4))
    flag = g.rng.choice(("True", "False"))
    forms = (
        f"torch.topk({v.name}, {k}, dim={dim}, largest={flag})[0]",
        f"torch.sort({v.name}, dim={dim}, descending={flag}, stable=True)[0]",
        f"torch.sort({v.name}, dim={dim}, descending={flag}, stable=True)[1]",
        f"torch.argsort({v.name}, dim={dim}, descending={flag}, stable=True)",
        f"torch.sort({v.name}, dim={dim}, descending={flag})[0]",
    )
    return g.add(g.rng.choice(forms), v, exact=True)

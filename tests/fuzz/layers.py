"""Statements: products, norms, attention, convolutions, recurrent layers."""

from __future__ import annotations

from graphs import Grower, Value


def linear(g: Grower) -> Value | None:
    v = g.value("f", (1, 2, 3, 4))
    out, bias = g.rng.choice((1, 2, 4, 5, 8, 17)), g.chance(0.7)
    name, init = g.attribute(f"nn.Linear({v.shape[-1]}, {out}, bias={bias})")
    ends = (
        "{}",
        "torch.relu({})",
        "F.gelu({})",
        "torch.sigmoid({})",
        "F.silu({})",
        "torch.tanh({})",
    )
    return g.add(g.rng.choice(ends).format(f"{name}({v.name})"), v, init=(init,))


def product(g: Grower) -> Value | None:
    a = g.value("f", (1, 2, 3, 4))
    b = g.value("f", (1, 2, 3, 4))
    size = a.shape[-1]
    name, init = g.attribute(f"nn.Parameter(torch.randn({size}, {g.rng.choice((1, 3, 8))}))")
    x, y = a.name, b.name
    forms: list[tuple[str, tuple[Value, ...], tuple[str, ...]]] = [
        (f"{x} @ {y}", (a, b), ()),
        (f"{x} @ {y}.transpose(-1, -2)", (a, b), ()),
        (f"{x} @ {x}.mT", (a,), ()),
        (f"{x}.mT @ {x}", (a,), ()),
        (f"{x} @ {name}", (a,), (init,)),
        (f"torch.einsum('...i,io->...o', {x}, {name})", (a,), (init,)),
        (f"torch.einsum('bld,bkd->blk', {x}, {y})", (a, b), ()),
        (f"torch.einsum('bl,bld->bd', {x}, {y})", (a, b), ()),
        (f"torch.einsum('bi,bj->bij', {x}, {y})", (a, b), ()),
        (f"({x} * {y}).sum(-1)", (a, b), ()),
        (f"F.cosine_similarity({x}, {y}, dim=-1)", (a, b), ()),
        (f"torch.cdist({x}, {y})", (a, b), ()),
        (f"torch.baddbmm({x} @ {x}.mT, {x}, {x}.mT, beta=0.5)", (a,), ()),
    ]
    text, uses, lines = g.rng.choice(forms)
    return g.add(text, *uses, init=lines)


def norm(g: Grower) -> Value | None:
    v = g.value("f", (2, 3, 4))
    size = v.shape[-1]
    if g.chance(0.3):
        channels = v.shape[1]
        name, init = g.attribute(f"nn.BatchNorm1d({channels})")
        more = (f"{name}.running_mean.uniform_()", f"{name}.running_var.uniform_(0.5, 2)")
        return g.add(f"{name}({v.name})", v, init=(init, *more))
    makers = (
        f"nn.LayerNorm({size})",
        f"nn.LayerNorm({size}, elementwise_affine=False)",
        f"nn.LayerNorm({size}, eps=1e-12)",
        f"nn.RMSNorm({size})",
        "nn.PReLU()",
        f"nn.Softmax(dim={g.dim(v)})",
    )
    name, init = g.attribute(g.rng.choice(makers))
    return g.add(f"{name}({v.name})", v, init=(init,))


def _mask(g: Grower, v: Value) -> tuple[str, tuple[Value, ...]]:
    """A mask over the keys of [B, L, D] or [B, H, L, D], as text for [B, (1,) Lq, Lk] scores."""
    length = v.shape[-2]
    ones = "None, None, :" if v.rank == 4 else "None, :"
    keys = g.value("b", 2, where=lambda m: m.shape[1] == length and m.follows(0))
    causal = f"torch.ones({length}, {length}, dtype=torch.bool).triu(1)"
    hidden = f"{keys.name}[:, {ones}]"
    kind = g.rng.choice(("keys", "causal", "both", "inverse"))
    if kind == "causal":
        return causal, ()
    if kind == "both":
        return f"({hidden} | {causal})", (keys,)
    return (hidden if kind == "keys" else f"~{hidden}"), (keys,)


def attention(g: Grower) -> Value | None:
    """Attention as people write it, with masks that hide whole rows."""
    q = g.value("f", (3, 3, 3, 4))
    alike = [
        v
        for v in g.values
        if v.kind == "f" and [t.shape for t in v.tensors] == [t.shape for t in q.tensors]
    ]
    k, v = g.rng.choice(alike), g.rng.choice(alike)
    dims = q.shape[-1]
    if not dims:
        raise LookupError
    heads = g.rng.choice([h for h in (1, 2, 4) if dims % h == 0] or [1])
    uses: tuple[Value, ...] = (q, k, v)
    names = [x.name for x in uses]
    if q.rank == 3 and heads > 1:
        split = ".unflatten(-1, ({}, -1)).transpose(1, 2)"
        names = [n + split.format(heads) for n in names]
    hidden, more = "", ()
    if g.chance(0.75):
        hidden, more = _mask(g, q)
        if q.rank == 3 and heads > 1 and more:
            hidden = hidden.replace("[:, None, :]", "[:, None, None, :]")
    number = g.rng.choice(("float('-inf')", "-1e9", "torch.finfo(self.real).min"))
    a, b, c = names
    form = g.rng.choice(("sdpa", "sdpa added", "filled", "added", "causal"))
    scale = g.rng.choice((f"* {dims**-0.5}", f"/ {dims**0.5}", "* 0.25", "", "/ 8"))
    if form.startswith("sdpa") and hidden:
        mask = f"~({hidden})"
        if form == "sdpa added":
            mask = f"torch.zeros((), dtype=self.real).masked_fill({hidden}, {number})"
        text = f"F.scaled_dot_product_attention({a}, {b}, {c}, attn_mask={mask})"
    elif form == "causal":
        text = f"F.scaled_dot_product_attention({a}, {b}, {c}, is_causal=True)"
    else:
        scores = f"({a} @ {b}.transpose(-1, -2) {scale})"
        if hidden and form == "filled":
            scores = f"{scores}.masked_fill({hidden}, {number})"
        elif hidden:
            scores += (
                f" + ({hidden}).to(self.real) * -1e9"
                if g.chance(0.5)
                else (f" + torch.zeros((), dtype=self.real).masked_fill({hidden}, {number})")
            )
        text = f"torch.softmax({scores}, -1) @ {c}"
    return g.add(text, *uses, *more)


def layer(g: Grower) -> Value | None:
    """torch's attention layers and convolutions over [B, L, D]."""
    v = g.value("f", 3, where=lambda x: x.follows(0) and min(x.shape) > 0)
    _, length, dims = v.shape
    heads = 2 if dims % 2 == 0 else 1
    kernel = g.rng.choice((1, 2, 3))
    kind = g.rng.choice(("mha", "encoder", "conv", "conv", "pool", "conv2"))
    if kind in ("mha", "encoder"):
        keys = [
            m
            for m in g.values
            if m.kind == "b" and m.rank == 2 and m.shape[1] == length and m.follows(0)
        ]
        mask = g.rng.choice(keys) if keys and g.chance(0.7) else None
        more = (mask,) if mask else ()
        if kind == "mha":
            name, init = g.attribute(f"nn.MultiheadAttention({dims}, {heads}, batch_first=True)")
            weights = g.rng.choice((0, 0, 1))
            padding = f", key_padding_mask={mask.name}" if mask else ""
            text = (
                f"{name}({', '.join([v.name] * 3)}{padding}, need_weights={weights > 0})[{weights}]"
            )
        else:
            first = g.rng.choice((True, False))
            name, init = g.attribute(
                f"nn.TransformerEncoderLayer({dims}, {heads}, 8, 0.0, batch_first=True, "
                f"norm_first={first})"
            )
            padding = f", src_key_padding_mask={mask.name}" if mask else ""
            text = f"{name}({v.name}{padding})"
        return g.add(text, v, *more, init=(init,))
    if kind == "pool":
        forms = (
            "F.max_pool1d({}, {})",
            "F.avg_pool1d({}, {})",
            "F.max_pool1d({}, {}, stride=1, padding=0)",
            "F.adaptive_avg_pool1d({}, 1)",
            "F.adaptive_max_pool1d({}, 1)",
            "F.avg_pool1d({}, {}, stride=1, padding=1)",
        )
        form = g.rng.choice(forms)
        return g.add(form.format(v.name, max(kernel, 2)), v)
    dilation, stride = g.rng.choice((1, 1, 2)), g.rng.choice((1, 1, 2))
    padding = g.rng.choice((0, 0, 1, 2))
    if kind == "conv2":
        name, init = g.attribute(
            f"nn.Conv2d(1, 3, ({kernel}, {dims}), stride={stride}, padding=({padding}, 0))"
        )
        return g.add(f"{name}({v.name}.unsqueeze(1))", v, init=(init,))
    groups = g.rng.choice((1, 1, dims))
    out = groups * g.rng.choice((1, 2, 3))
    name, init = g.attribute(
        f"nn.Conv1d({dims}, {out}, {kernel}, stride={stride}, padding={padding}, "
        f"dilation={dilation}, groups={groups})"
    )
    return g.add(f"{name}({v.name}.transpose(1, 2)).transpose(1, 2)", v, init=(init,))


def recurrent(g: Grower) -> Value | None:
    v = g.value("f", 3, where=lambda x: x.follows(0) and x.shape[2] > 0)
    size, both, layers = g.rng.choice((1, 3, 5)), g.chance(0.25), g.rng.choice((1, 1, 2))
    cell = g.rng.choice(("GRU", "LSTM", "RNN"))
    name, init = g.attribute(
        f"nn.{cell}({v.shape[2]}, {size}, num_layers={layers}, bidirectional={both}, "
        "batch_first=True)"
    )
    part = g.rng.choice(
        ("[0]", "[0][:, -1]", "[1][-1]", "[1][0][-1]" if cell == "LSTM" else "[1][0]")
    )
    return g.add(f"{name}({v.name}){part}", v, init=(init,))


def fourier(g: Grower) -> Value | None:
    v = g.value("f", (2, 3))
    dim = g.dim(v)
    size = v.shape[dim]
    kind = f"dim={dim}, norm={g.rng.choice(('ortho', 'backward', 'forward'))!r}"
    return g.add(
        f"torch.fft.irfft(torch.fft.rfft({v.name}, {kind}) * 0.5, n={size}, {kind})",
        v,
    )

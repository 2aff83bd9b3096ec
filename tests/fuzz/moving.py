"""Statements: views, joins, indexing, embeddings, positions."""

from __future__ import annotations

from graphs import Grower, Value


def _number(g: Grower, v: Value, dim: int) -> int:
    return g.rng.randint(-v.shape[dim], v.shape[dim] - 1) if v.shape[dim] else 0


def view(g: Grower) -> Value | None:
    v = g.value("fdinb")
    d, e = g.dim(v, batch=0.1), g.dim(v, batch=0.1)
    i, n = _number(g, v, d), v.name
    a = g.rng.randint(0, max(v.shape[d], 1))
    b = g.rng.randint(a, max(v.shape[d], a))
    step = g.rng.choice((1, 1, 2, 3))
    pick = ":, " * (d % v.rank)
    axes = [0, *g.rng.sample(range(1, v.rank), v.rank - 1)] if g.chance(0.9) else None
    axes = axes or g.rng.sample(range(v.rank), v.rank)
    forms = (
        f"{n}.unsqueeze({g.rng.randint(-v.rank - 1, v.rank)})",
        f"{n}.squeeze({d})",
        f"{n}.transpose({d}, {e})",
        f"{n}.permute({axes})",
        f"{n}.select({d}, {i})",
        f"{n}[{pick}{a}:{b}:{step}]",
        f"{n}[..., {-a if a else None}:]",
        f"{n}.flatten(1)",
        f"{n}.flatten(0, 1)",
        f"{n}.reshape({n}.shape[0], -1)",
        f"{n}.reshape(-1)",
        f"{n}.reshape(-1, {n}.shape[-1])",
        f"{n}.unflatten({d}, ({g.rng.choice((1, 2, 3))}, -1))",
        f"{n}.expand({g.rng.choice((2, 3))}, *{n}.shape)",
        f"{n}.unsqueeze(1).expand(-1, {g.rng.choice((1, 2, 5))}, *{n}.shape[1:])",
        f"{n}.flip({d})",
        f"{n}.roll({g.rng.randint(-3, 3)}, {d})",
        f"{n}.repeat_interleave({g.rng.choice((1, 2, 3))}, dim={d})",
        f"{n}.repeat({', '.join(['1'] + [str(g.rng.choice((1, 2))) for _ in range(v.rank - 1)])})",
        f"{n}.chunk({g.rng.choice((1, 2, 3))}, dim={d})[-1]",
        f"{n}.split({g.rng.choice((1, 2, 3))}, dim={d})[0]",
        f"{n}.unbind({d})[{i}]",
        f"{n}.movedim({d}, {e})",
        f"{n}.narrow({d}, {a}, {b - a})",
        f"torch.tril({n}, {g.rng.randint(-2, 2)})",
        f"torch.triu({n}, {g.rng.randint(-2, 2)})",
        f"F.pad({n}, ({g.rng.randint(-1, 2)}, {g.rng.randint(0, 2)}), value={g.rng.randint(0, 2)})",
        f"{n}.diagonal(dim1={d}, dim2={e})",
    )
    return g.add(g.rng.choice(forms), v, exact=True)


def join(g: Grower) -> Value | None:
    a = g.value("fdinb")
    same = [v for v in g.values if v.kind == a.kind and v.rank == a.rank]
    dim = g.dim(a)
    others = [
        v
        for v in same
        if all(
            x.shape[d] == y.shape[d]
            for x, y in zip(a.tensors, v.tensors, strict=True)
            for d in range(a.rank)
            if d != dim % a.rank
        )
    ]
    count = min(len(others), g.rng.choice((1, 2, 3)))
    parts = [a, *g.rng.sample(others, count)]
    names = ", ".join(p.name for p in parts)
    form = g.rng.choice(("cat", "cat", "stack"))
    return g.add(f"torch.{form}([{names}], {dim})", *parts, exact=True)


def indexed(g: Grower) -> Value | None:
    v = g.value("fib", (1, 2, 3, 4))
    dim = g.dim(v)
    size, n = v.shape[dim], v.name
    index = g.value("i")
    bound = f"({index.name} % {max(size, 1)})"
    dim = dim % v.rank
    lead = ":, " * dim
    choices = []
    if index.rank == v.rank:
        choices += [
            f"torch.gather({n}, {dim}, {bound})",
            f"torch.take_along_dim({n}, {bound}, {dim})",
        ]
    if index.rank == 1:
        choices += [f"torch.index_select({n}, {dim}, {bound})"]
        if v.rank > 1 and dim == 1:
            choices += [f"{n}[torch.arange({n}.shape[0]), {bound}]"] * 3
    if index.rank < 3:
        choices += [f"{n}[{lead}{bound}]", f"{n}[{lead}{bound} - {size}]" if size else f"{n}"]
    if v.rank == 3 and dim == 1 and index.rank == 2:
        expanded = f"{bound}.unsqueeze(-1).expand(-1, -1, {n}.shape[-1])"
        choices += [f"torch.gather({n}, 1, {expanded})"] * 3
    fixed = [g.rng.randrange(max(size, 1)) for _ in range(g.rng.choice((0, 1, 3)))]
    choices += [f"{n}[{lead}{fixed}]" if fixed else f"{n}"]
    return g.add(g.rng.choice(choices), v, index, exact=True)


def put(g: Grower) -> Value | None:
    v = g.value("f", (2, 3))
    n, size = v.name, v.shape[-1]
    index = g.value("i", v.rank)
    source = g.value("f", v.rank)
    bound = f"({index.name} % {max(size, 1)})"
    mask = g.value("b", (1, 2, 3))
    forms = (
        f"{n}.scatter(-1, {bound}, 2.5)",
        f"{n}.scatter_add(-1, {bound}, {source.name})",
        f"torch.zeros_like({n}).scatter_add(-1, {bound}, {source.name})",
        f"{n}.index_put(({mask.name},), torch.tensor(0.5, dtype=self.real))",
        f"{n}.slice_scatter({source.name}[..., :1], -1, 0, 1)",
        f"{n}.select_scatter({source.name}[..., 0], -1, -1)",
        f"F.one_hot({bound}, {max(size, 1)}).to(self.real)",
    )
    return g.add(g.rng.choice(forms), v, index, source, mask)


def embedding(g: Grower) -> Value | None:
    ids = g.value("i", (1, 2, 3))
    rows, width = g.rng.choice((1, 7, 10)), g.rng.choice((1, 3, 4, 8))
    name, init = g.attribute(f"nn.Embedding({rows}, {width}, padding_idx=0)")
    if g.chance(0.15):
        name, init = g.attribute(
            f"nn.EmbeddingBag({rows}, {width}, mode='{g.rng.choice(('sum', 'mean'))}')"
        )
    return g.add(f"{name}({ids.name} % {rows})", ids, exact="Bag" not in init, init=(init,))


def positions(g: Grower) -> Value | None:
    """Masks and positions made of sizes and lengths."""
    v = g.value("fin", (2, 3))
    lengths = g.value("i", 1, where=lambda x: x.follows(0))
    forms = (
        "torch.arange({v}.shape[1])[None] < {l}[:, None]",
        "(torch.arange({v}.shape[1])[None] >= {l}[:, None])",
        "torch.arange({v}.shape[1]).expand({v}.shape[0], -1)",
        "torch.arange({v}.shape[1], 0, -1).to(self.real)",
        "torch.zeros({v}.shape[0], 2, dtype=self.real)",
        "torch.linspace(0, 1, {v}.shape[1], dtype=self.real)",
        "{v}.new_ones({v}.shape[0], 3)",
        "torch.arange({v}.shape[0])",
        "({l}[:, None] - torch.arange(3)).clamp(min=0)",
    )
    return g.add(g.rng.choice(forms).format(v=v.name, l=lengths.name), v, lengths, exact=True)


def casts(g: Grower) -> Value | None:
    v = g.value("fdinb")
    forms = (
        "{}.to(self.real)",
        "{}.long()",
        "{}.int()",
        "{}.bool()",
        "{}.short()",
        "{}.type_as({})",
    )
    return g.add(g.rng.choice(forms).format(v.name, v.name), v, exact=v.kind != "d")


def assigned(g: Grower) -> Value | None:
    """Values written in place into a copy."""
    v = g.value("f", (2, 3))
    mask = g.value("b", where=lambda m: m.rank <= v.rank and m.shape == v.shape[: m.rank])
    shaped = f"{mask.name}.reshape({mask.name}.shape + (1,) * {v.rank - mask.rank})"
    return g.add(
        f"{v.name}.clone().masked_fill_({shaped}, 0.5).mul_(2)",
        v,
        mask,
        exact=True,
    )

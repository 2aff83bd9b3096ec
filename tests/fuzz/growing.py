"""Whole models of random graphs."""

from __future__ import annotations

import random

from graphs import Grower, Input, Model, Value
from ops import OPS

_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17)


def _inputs(rng: random.Random) -> list[Input]:
    length, dims = rng.choice(_SIZES), rng.choice(_SIZES[:-1])
    if rng.random() < 0.005:
        length = 0
    floats = (
        "torch.randn(B, {})",
        "torch.randint(-4, 5, (B, {})) / 2.0",
        "torch.randn(B, {}) * 5",
        "torch.randn(B, {}) * (torch.rand(B, {}) > 0.5)",
        "torch.randint(-1, 2, (B, {})) * 1.0",
    )

    def some(*sizes: int) -> str:
        inner = ", ".join(map(str, sizes))
        return rng.choice(floats).format(*[inner] * 2)

    lengths = f"torch.randint(0, {length + 1}, (B, 1))"
    prefix = rng.choice(
        (f"(torch.arange({length}) < {lengths})", f"(torch.arange({length}) >= {lengths})")
    )
    inputs = [
        Input("x0", some(length, dims)),
        Input("x1", f"torch.randint(1, 10, (B, {length})) * {prefix}"),
        Input("x2", f"torch.randint(0, {length + 1}, (B,))"),
    ]
    more = [
        Input("x3", some(dims)),
        Input("x4", some(length)),
        Input("x5", f"torch.rand(B, {length}) > {rng.choice((0.2, 0.5, 0.8))}"),
        Input("x6", f"torch.randint(-9, 10, (B, {length}), dtype=torch.int32)"),
        Input("x7", f"torch.randn(B, {dims}, dtype=torch.float64)"),
        Input("x8", f"torch.randint(-(2**31), 2**31, (B, {dims}), dtype=torch.int32)"),
        Input("x9", some(length, dims)),
        Input("x10", f"torch.randint(-300, 300, (B, {length}), dtype=torch.int16)"),
        Input("x11", some(rng.choice((1, 2)), length, dims)),
    ]
    chance = {"x8": 0.1, "x10": 0.1, "x7": 0.15, "x11": 0.3}
    inputs += [i for i in more if rng.random() < chance.get(i.name, 0.5)]
    return inputs


def grown(seed: int, graphs: int, batches: tuple[int, int] | None = None) -> Model:
    """A model of ``graphs`` random graphs; the same seed gives the same model."""
    rng = random.Random(seed)
    inputs = _inputs(rng)
    first = rng.choice((1, 2, 3, 4, 5))
    other = rng.choice([b for b in (1, 2, 3, 6) if b != first])
    model = Model(inputs, [], {}, batches or (first, other), seed)
    grower = Grower(rng, seed, model.batches)
    requests = [model.request(b, seed + i) for i, b in enumerate(model.batches)]
    grower.values = [Value(i.name, [r[place] for r in requests]) for place, i in enumerate(inputs)]
    keys = Value("x1", grower.values[1].tensors)
    given = list(grower.values)
    ops, weights = list(OPS), list(OPS.values())
    for number in range(graphs):
        grower.values, grower.own = list(given), len(given)
        grower.add("x1 == 0", keys, exact=True)
        grower.own += 1
        wanted, tries = rng.randint(1, 7), 0
        while len(grower.values) - grower.own < wanted and tries < 60:
            tries += 1
            try:
                rng.choices(ops, weights)[0](grower)
            except LookupError:
                continue
        mine = [v for v in grower.values[grower.own :] if v.returnable]
        if mine:
            results = mine[-1:]
            if len(mine) > 1 and rng.random() < 0.4:
                results.append(rng.choice(mine[:-1]))
            model.results[f"g{number}"] = [v.name for v in results]
    model.statements = grower.statements
    return model.only(model.results)

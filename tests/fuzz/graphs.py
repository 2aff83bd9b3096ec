"""Random torch models, as source text: a few graphs of a few statements each over shared inputs.

A graph is grown statement by statement. Each candidate is run at once, on requests of two batch
sizes, so that what torch refuses is dropped, and dimensions that follow the batch are known.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ELEMENTS = 6000


@dataclass
class Statement:
    """``name = expression``.

    Args:
        name, expression: the source.
        uses: names of the values that the expression reads.
        exact: whether every correct implementation gives the same bits.
        init: lines of the model's constructor that it needs.
        seed: of those lines.
    """

    name: str
    expression: str
    uses: tuple[str, ...]
    exact: bool
    init: tuple[str, ...] = ()
    seed: int = 0

    @property
    def line(self) -> str:
        return f"{self.name} = {self.expression}"


@dataclass
class Input:
    """An input: its name, and the expression that draws it for a batch of ``B``."""

    name: str
    expression: str


@dataclass
class Model:
    """Inputs, statements, and what the model returns: graph -> names of values.

    Args:
        batches: sizes of the batch that it was grown with.
        seed: of weights and inputs.
    """

    inputs: list[Input]
    statements: list[Statement]
    results: dict[str, list[str]]
    batches: tuple[int, int]
    seed: int

    def only(self, results: dict[str, list[str]]) -> Model:
        """The model with these results, without statements and inputs that they do not need."""
        needed = {name for names in results.values() for name in names}
        kept = []
        for statement in reversed(self.statements):
            if statement.name in needed:
                kept.append(statement)
                needed |= set(statement.uses)
        inputs = [i for i in self.inputs if i.name in needed]
        # A model without an input of floats or ids has no batch.
        return Model(
            inputs or self.inputs[:1],
            kept[::-1],
            results,
            self.batches,
            self.seed,
        )

    @property
    def source(self) -> str:
        """The model as a class ``Model``."""
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += ["        self.real = torch.float32"]
        for statement in self.statements:
            if statement.init:
                lines.append(f"        torch.manual_seed({statement.seed})")
            lines += [f"        {line}" for line in statement.init]
        names = ", ".join(i.name for i in self.inputs)
        lines += ["", f"    def forward(self, {names}):"]
        lines += [f"        {s.line}" for s in self.statements]
        shown = ", ".join(f"{g!r}: [{', '.join(names)}]" for g, names in self.results.items())
        return "\n".join([*lines, f"        return {{{shown}}}"])

    def named(self, text: str) -> set[str]:
        """The graphs that hold a statement whose line ("model.py:12") a text names."""
        lines = self.source.splitlines()
        named = {lines[int(n) - 1].strip() for n in re.findall(r"model\.py:(\d+)", text)}
        found = set()
        for graph, names in self.results.items():
            own = self.only({graph: names})
            if any(statement.line in named for statement in own.statements):
                found.add(graph)
        return found

    def script(self) -> str:
        """The model and its inputs as a script that compares the native engine with torch."""
        lines = ["import torch, torch.nn.functional as F", "from torch import nn", "import fastrec"]
        lines += [self.source, "", "def inputs(B, seed):", "    torch.manual_seed(seed)"]
        lines += [f"    {i.name} = {i.expression}" for i in self.inputs]
        lines += [f"    return ({', '.join(i.name for i in self.inputs)},)", ""]
        first, other = self.batches
        lines += ["model = Model().eval()"]
        lines += [
            f"engine = fastrec.compile(model, inputs({first}, {self.seed}), backend='native', "
            "threads=1, fallback='error')"
        ]
        lines += [f"for B, seed in (({first}, {self.seed}), ({other}, {self.seed + 1})):"]
        lines += ["    print(model(*inputs(B, seed)), engine(*inputs(B, seed)))"]
        return "\n".join(lines)

    def module(self) -> nn.Module:
        """The model, in eval mode."""
        space: dict[str, Any] = {"nn": nn, "torch": torch, "F": F}
        exec(compile(self.source, "model.py", "exec"), space)
        made: nn.Module = space["Model"]().eval()
        return made

    def request(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        """Inputs of a batch."""
        torch.manual_seed(seed)
        space = {"torch": torch, "B": batch}
        return tuple(eval(i.expression, space) for i in self.inputs)


@dataclass
class Value:
    """The tensors of a name, one a request."""

    name: str
    tensors: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape)

    @property
    def rank(self) -> int:
        return self.tensors[0].ndim

    @property
    def kind(self) -> str:
        """``f`` float32, ``d`` float64, ``b`` bool, ``i`` int64, ``n`` a narrower integer."""
        dtype = self.tensors[0].dtype
        if dtype.is_floating_point:
            return "d" if dtype is torch.float64 else "f"
        return {torch.bool: "b", torch.int64: "i"}.get(dtype, "n")

    def follows(self, dim: int) -> bool:
        """Whether a dimension's size depends on the batch."""
        return len({t.shape[dim] for t in self.tensors}) > 1

    @property
    def returnable(self) -> bool:
        """Whether it may be a result: the batch first, or independent of it."""
        tail = all(not self.follows(d) for d in range(1, self.rank))
        if not self.rank or not tail:
            return tail
        return self.follows(0) or self.shape[0] > 0


@dataclass
class Grower:
    """Grows a model; ``rng`` makes every choice."""

    rng: random.Random
    seed: int
    batches: tuple[int, int]
    values: list[Value] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    owner: nn.Module = field(default_factory=nn.Module)
    own: int = 0  # the first value of this graph
    made: int = 0

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def value(self, kinds: str = "f", rank: int | tuple[int, ...] = (), **more: Any) -> Value:
        """A value of these kinds and ranks, a new one rather than an old one.

        Raises:
            LookupError: there is none.
        """
        ranks = (rank,) if isinstance(rank, int) else rank
        test: Callable[[Value], bool] = more.get("where", lambda v: True)
        found = [
            v for v in self.values if v.kind in kinds and (not ranks or v.rank in ranks) and test(v)
        ]
        if not found:
            raise LookupError
        new = [v for v in found if v in self.values[self.own :]]
        if new and self.chance(0.85):
            return new[-1] if self.chance(0.6) else self.rng.choice(new)
        return self.rng.choice(found)

    def dim(self, v: Value, *, batch: float = 0.02) -> int:
        """A dimension of a value, seldom one that follows the batch; negative at times."""
        if not v.rank:
            raise LookupError
        dims = [d for d in range(v.rank) if not v.follows(d) or self.chance(batch)]
        if not dims:
            raise LookupError
        dim = self.rng.choice(dims)
        return dim - v.rank if self.chance(0.4) else dim

    def attribute(self, line: str) -> tuple[str, str]:
        """A name of an attribute, and the constructor's line that sets it."""
        name = f"p{self.made}_{len(self.statements)}"
        return f"self.{name}", f"self.{name} = {line}"

    def add(
        self, expression: str, *uses: Value, exact: bool = False, init: tuple[str, ...] = ()
    ) -> Value | None:
        """Append a statement if torch can run it and its result is small enough."""
        self.made += 1
        name = f"v{self.made}"
        tensors = []
        seed = self.seed + self.made
        statement = Statement(name, expression, tuple(u.name for u in uses), exact, init, seed)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                self.owner.real = torch.float32
                torch.manual_seed(seed)
                space = {"self": self.owner, "nn": nn, "torch": torch, "F": F}
                for line in init:
                    exec(line, space)
                self.owner.eval()
                for request in range(len(self.batches)):
                    held = {u.name: u.tensors[request] for u in uses}
                    tensors.append(eval(expression, {**space, **held}))
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            return None
        first = tensors[0]
        good = all(isinstance(t, Tensor) and t.numel() <= MOST_ELEMENTS for t in tensors)
        if not good or first.dtype.is_complex or any(t.ndim != first.ndim for t in tensors):
            return None
        if first.ndim > 5:
            return None
        made = Value(name, tensors)
        self.values.append(made)
        self.statements.append(statement)
        return made

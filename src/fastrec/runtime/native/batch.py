"""Whether the users of a batch are independent in a program, so that they may run apart."""

from __future__ import annotations

from fastrec.runtime.native.buffers import Extent, Shape, View, product
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step


def batch_symbol(program: Program) -> str | None:
    """The symbol that counts the users of a call: the first dimension of all that depends on it,
    whose rows no step mixes. None where the program has no such symbol.
    """
    for symbol in program.symbols:
        shapes = [b.shape for b in program.inputs]
        shapes += [v.buffer.shape for v in (program.output, *program.more_outputs)]
        if all(s[:1] == (Extent(1, (symbol,)),) for s in shapes if _depends(s, symbol)) and all(
            _keeps_apart(step, symbol) for step in program.steps
        ):
            return symbol
    return None


def rows_of_layers(program: Program, symbol: str) -> list[Extent]:
    """How many rows of one user the linear layers see."""
    rows = {product(s.x.shape[:-1]) for s in program.steps if s.kind.startswith("linear")}
    return [
        Extent(r.coefficient, tuple(s for s in r.symbols if s != symbol))
        for r in sorted(rows, key=str)
    ]


def _depends(shape: Shape, symbol: str) -> bool:
    return any(symbol in size.symbols for size in shape)


def _leads(view: View, symbol: str) -> bool:
    shape = view.shape
    return bool(shape) and shape[0].symbols.count(symbol) == 1 and not _depends(shape[1:], symbol)


def _user_by_user(view: View, symbol: str) -> bool:
    """Not a single user's values, for all; nor users in any dimension but the first."""
    if _depends(view.buffer.shape, symbol):
        return _leads(view, symbol) and view.strides[0].number != 0
    return _leads(view, symbol) or not _depends(view.shape, symbol)


def _keeps_apart(step: Step, symbol: str) -> bool:
    views = [*step.inputs, *step.outputs]
    if not all(_user_by_user(view, symbol) for view in views):
        return False
    if not _leads(step.y, symbol):
        return not any(_leads(view, symbol) for view in views)
    if step.kind == "map":
        return not any(name == "index" and of[0] == 0 for name, *of in step.program)
    first = step.inputs[0]
    many = step.kind_info.users == "apart_of_two"
    return step.kind_info.users != "mixed" and len(first.shape) > many and _leads(first, symbol)

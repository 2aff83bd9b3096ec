"""Whether the users of a batch are independent in a plan, so that each may be run for itself."""

from __future__ import annotations

from fastrec.runtime.native.ir import Extent, Plan, Shape, Step, View, product

# What these kinds compute of a row of their first dimension depends on that row alone, as long as
# the dimensions that they sum or normalise over are others.
_BY_ROW = ("map", "gather", "quantize")
_BY_ROW_OF_MANY = (
    "attention",
    "causal_attention",
    "cumsum",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_bf16",
    "linear_int8",
    "masked_attention",
    "matmul",
    "reduce",
    "separable_projection",
    "softmax",
    "window_sparse_attention",
    "window_sparse_attention_int8",
)


def batch_symbol(plan: Plan) -> str | None:
    """The symbol that counts the users of a call: the first dimension of all that depends on it,
    whose rows no step mixes. None where the plan has no such symbol.
    """
    for symbol in plan.symbols:
        shapes = [b.shape for b in plan.inputs]
        shapes += [v.buffer.shape for v in (plan.output, *plan.more_outputs)]
        if all(s[:1] == (Extent(1, (symbol,)),) for s in shapes if _depends(s, symbol)) and all(
            _keeps_apart(step, symbol) for step in plan.steps
        ):
            return symbol
    return None


def rows_of_layers(plan: Plan, symbol: str) -> list[Extent]:
    """How many rows of one user the linear layers see."""
    rows = {product(s.inputs[0].shape[:-1]) for s in plan.steps if s.kind.startswith("linear")}
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
    if not _leads(step.output, symbol):
        return not any(_leads(view, symbol) for view in views)
    if step.kind == "map":
        return not any(name == "index" and of[0] == 0 for name, *of in step.program)
    if step.kind not in (*_BY_ROW, *_BY_ROW_OF_MANY):
        return False
    many = step.kind in _BY_ROW_OF_MANY
    return len(step.inputs[0].shape) > many and _leads(step.inputs[0], symbol)

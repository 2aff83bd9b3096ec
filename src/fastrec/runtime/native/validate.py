"""A plan that came from a file, checked before it runs: whatever it says, no kernel may touch
memory outside the buffers, at any sizes. numpy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from fastrec.errors import ArtifactError
from fastrec.runtime.native.bounds import room_behind
from fastrec.runtime.native.ir import Buffer, Extent, Plan, Shape, Step, View, product
from fastrec.runtime.native.passes import CHUNK
from fastrec.spec import InputSpec

MAX_SYMBOLS, MAX_DIMS, MAX_OPERANDS = 4, 6, 32
_MAX_COEFFICIENT, _MAX_DEGREE = 2**40, 8
# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: the packed weight's sizes, kMaxInputs.
_PANEL, _GROUP, _GROUP_BYTES, _MAX_INPUTS = 32, 4, 128, 65793
_ACTIVATIONS = 3
# csrc/cpu/window_sparse_attention/window_sparse_attention.h: kMaxDims; sums of positions and
# distances stay far from what 64 bits hold.
_MAX_HEAD_DIM, _MAX_DISTANCE = 256, 2**31
# csrc/cpu/window_sparse_attention_int8/window_sparse_attention_int8.h: kMaxKeys; scales whose
# products with its integers are finite in fp32.
_MAX_KEYS, _MAX_SCALE = 65_536, 1e30
# csrc/cpu/separable_projection/separable_projection.h: kMaxWidth.
_MAX_TAPS = 31
# csrc/cpu/engine/reduce.cpp
_REDUCTIONS, _MEAN = 3, 1


def require(true: bool, what: str) -> None:
    """Raise ArtifactError unless ``true``; ``what`` is what a sound plan has."""
    if not true:
        raise ArtifactError(f"an invalid plan: {what}")


def validate(plan: Plan, spec: InputSpec) -> None:
    """Refuse a plan that the executor must not see.

    Raises:
        ArtifactError: what is wrong, and in which step.
    """
    require(len(set(plan.symbols)) == len(plan.symbols) <= MAX_SYMBOLS, "at most 4 symbols")
    require(len(plan.inputs) == len(spec.fields) > 0, "an input buffer for each input")
    for buffer, field in zip(plan.inputs, spec.fields, strict=True):
        dims = tuple(Extent.of(d) for d in field.dims)
        fits = buffer.shape == dims and buffer.dtype == field.dtype and buffer.space == "input"
        require(fits, f"input {field.name} as its specification says")
    require(all(low >= 1 for low, _ in spec.limits.values()), "sizes of at least 1")
    found = {s.symbols for b in plan.inputs for s in b.shape if s.coefficient == 1}
    require(all((s,) in found for s in plan.symbols), "each symbol is the size of an input")
    require(not plan.more_outputs, "one output")
    _buffer(plan.output.buffer, plan)
    require(plan.output.dtype == "float32" and _whole(plan.output), "a whole float32 output")
    written = set(plan.inputs)
    for position, step in enumerate(plan.steps):
        try:
            _step(plan, step, written)
            if step.kind == "window_sparse_attention_int8":
                _sums_fit(step, spec)
        except ArtifactError as error:
            raise ArtifactError(f"{error} (step {position}, {step.kind})") from None
        written.update(v.buffer for v in step.outputs)
    require(plan.output.buffer in written, "an output that is computed")


def _step(plan: Plan, step: Step, written: set[Buffer]) -> None:
    views = [*step.inputs, *step.outputs]
    require(step.kind in _RULES, "a step kind that this version knows")
    require(len(views) <= MAX_OPERANDS, f"at most {MAX_OPERANDS} operands")
    require(all(map(math.isfinite, step.numbers)), "finite numbers")
    for view in views:
        _buffer(view.buffer, plan)
        _inside(view, plan)
    for view in step.inputs:
        known = view.buffer in written or view.buffer.data is not None
        require(known, "operands that were computed before they are read")
    for view in step.outputs:
        require(view.buffer.space in ("arena", "output"), "a result that may be written")
        own = view.buffer.space == "arena" or view.buffer is plan.output.buffer
        require(own, "no other output than the plan's")
    require(step.kind == "layer_norm" or step.extra_output is None, "one result")
    require(step.kind == "map" or not step.program, "a program in maps only")
    _RULES[step.kind](step)


def _extents(extents: Shape, plan: Plan) -> None:
    require(len(extents) <= MAX_DIMS, f"at most {MAX_DIMS} dimensions")
    for e in extents:
        require(0 <= e.coefficient <= _MAX_COEFFICIENT, "sizes and strides of 0 or more")
        require(len(e.symbols) <= _MAX_DEGREE, "sizes of few symbols")
        require(set(e.symbols) <= set(plan.symbols), "sizes of known symbols")


def _buffer(buffer: Buffer, plan: Plan) -> None:
    _extents(buffer.shape, plan)
    if buffer.data is not None:
        require(product(buffer.shape) == Extent(buffer.data.size), "constants of their shape")
    elif buffer.space == "input":
        require(buffer in plan.inputs, "inputs that the plan has")


def _inside(view: View, plan: Plan) -> None:
    """Every element of the view is one of its buffer, whatever the sizes."""
    _extents(view.shape, plan)
    _extents(view.strides, plan)
    require(len(view.shape) == len(view.strides), "a stride for each size")
    require(0 <= view.offset <= _MAX_COEFFICIENT, "offsets of 0 or more")
    if any(size.coefficient == 0 for size in view.shape):
        require(view.offset == 0, "empty operands at the start of their buffers")
        return
    require(all(c >= 0 for c in room_behind(view).values()), "operands inside their buffers")


# What each kind takes: csrc/cpu/engine/<kind>.cpp says the same in its first lines.


def _counts(step: Step, inputs: Sequence[int], integers: int, numbers: int) -> None:
    require(len(step.inputs) in inputs, f"{list(inputs)} inputs")
    require(len(step.integers) == integers, f"{integers} integers")
    require(len(step.numbers) == numbers, f"{numbers} numbers")


def _flags(*values: int) -> None:
    require(all(v in (0, 1) for v in values), "flags of 0 or 1")


def _bytes(*values: int) -> None:
    require(all(0 <= v <= 255 for v in values), "zero points in 0..255")


def _dense(view: View, *dtypes: str) -> None:
    require(view.dtype in dtypes, f"{' or '.join(dtypes)}, not {view.dtype}")
    require(view.is_contiguous, "contiguous operands")


def _whole(view: View) -> bool:
    same = product(view.shape) == product(view.buffer.shape)
    return view.offset == 0 and view.is_contiguous and same


def _table(view: View, dtype: str, *sizes: int) -> np.ndarray:
    """A contiguous constant of these sizes."""
    _dense(view, dtype)
    require(view.buffer.data is not None, "weights that are constants")
    require(view.shape == tuple(map(Extent, sizes)), f"weights of sizes {list(sizes)}")
    data = view.constant
    assert data is not None
    return data


def _rows(x: View) -> tuple[Extent, int]:
    """Rows and width of a matrix with a fixed width."""
    require(len(x.shape) > 0, "rows of numbers")
    width = x.shape[-1].number
    require(width is not None and width > 0, "rows of a fixed width")
    assert width is not None
    return product(x.shape[:-1]), width


def _tiles(view: View, rows: Extent, width: int) -> None:
    """Room for rows in the tiles of the widest elements, from a line's start on."""
    chunks = -(-width // CHUNK)
    require(view.dtype == "uint8" and view.offset == 0, "tiles that fill a uint8 buffer")
    require(view.buffer.space == "arena", "tiles within the arena")
    room = product(view.buffer.shape) == rows * Extent(2 * CHUNK * chunks)
    require(room, "tiles that fill their buffer")


def _map(step: Step) -> None:
    _counts(step, range(MAX_OPERANDS), 0, 0)
    out = step.output
    require(out.dtype in ("float32", "int64", "bool"), "maps to float32, int64 or bool")
    for view in step.inputs:
        require(view.shape == out.shape, "operands expanded to the result's shape")
    for name, *operands in step.program:
        if name == "integer":
            require(abs(operands[0]) < 2**62, "integers of 63 bits")


def _gather(step: Step) -> None:
    _counts(step, (2, 3), 0, 0)
    ids, table, *scale = step.inputs
    _dense(ids, "int64")
    require(len(table.shape) == 2, "a table of two dimensions")
    rows, dims = table.shape[0].number, table.shape[1].number
    require(rows is not None and dims is not None, "a table of a fixed size")
    assert rows is not None
    assert dims is not None
    _table(table, "int8" if scale else "float32", rows, dims)
    if scale:
        _table(scale[0], "float32", rows)
    _dense(step.output, "float32")
    whole = product(step.output.shape) == product(ids.shape) * Extent(dims)
    require(whole, "a row for each id")


def _layer_norm(step: Step) -> None:
    _counts(step, (3, 4), 3, 2)
    residual, zero_point, tiles = step.integers
    _flags(residual, tiles)
    _bytes(zero_point)
    require(step.numbers[1] > 0, "scales above 0")
    require(len(step.inputs) == 3 + residual, "a residual, or none, as the step says")
    rows, width = _rows(step.inputs[0])
    wholes = [step.inputs[0], *step.inputs[1 : 1 + residual]]
    for view in (*wholes, *step.outputs[:-1]):
        _dense(view, "float32")
        require(product(view.shape) == rows * Extent(width), "operands of one size")
    for view in step.inputs[1 + residual :]:
        _table(view, "float32", width)
    _result(step.output, rows, width, tiles)


def _result(y: View, rows: Extent, width: int, tiles: int) -> None:
    _dense(y, "float32", "uint8")
    require(product(y.shape) == rows * Extent(width), "results of the operands' size")
    if tiles:
        _tiles(y, rows, width)


def _linear(step: Step) -> None:
    _counts(step, (2, 3), 2, 0)
    bias, activation = step.integers
    _flags(bias)
    require(0 <= activation < _ACTIVATIONS, "a known activation")
    require(len(step.inputs) == 2 + bias, "a bias, or none, as the step says")
    x, weight = step.inputs[:2]
    rows, inputs = _rows(x)
    _dense(x, "float32")
    require(len(weight.shape) == 2, "a weight of two dimensions")
    outputs = weight.shape[0].coefficient
    require(outputs > 0, "outputs")
    _table(weight, "float32", outputs, inputs)
    if bias:
        _table(step.inputs[2], "float32", outputs)
    _dense(step.output, "float32")
    _result(step.output, rows, outputs, 0)


def _linear_int8(step: Step) -> None:
    _counts(step, (6, 7), 8, 2)
    outputs, inputs, x_zero, activation, bias, y_zero, x_tiles, y_tiles = step.integers
    _flags(bias, x_tiles, y_tiles)
    _bytes(x_zero, y_zero)
    require(0 <= activation < _ACTIVATIONS, "a known activation")
    require(min(step.numbers) > 0, "scales above 0")
    require(outputs > 0 and 0 < inputs <= _MAX_INPUTS, "sizes that sums of 32 bits allow")
    require(len(step.inputs) == 6 + bias, "a bias, or none, as the step says")
    x, values, group_index, panel_start, *per_output = step.inputs
    rows, width = _rows(x)
    require(width == inputs, "as many inputs as the weight has")
    _dense(x, "float32", "uint8")
    if x_tiles:
        _tiles(x, rows, width)
    groups = group_index.shape[0].coefficient if group_index.shape else -1
    require(groups >= 0, "groups of weights")
    _table(values, "int8", *((groups, _GROUP_BYTES) if len(values.shape) == 2 else (-1,)))
    index = _table(group_index, "int32", groups)
    panels = -(-outputs // _PANEL)
    start = _table(panel_start, "int32", panels + 1)
    require(start[0] == 0 and start[-1] == groups, "panels that own all groups")
    require(bool((np.diff(start) >= 0).all()), "panels one after another")
    reach = -(-inputs // _GROUP)
    require(bool(((index >= 0) & (index < reach)).all()), "groups among the inputs")
    for view, dtype in zip(per_output, ("float32", "int32", "float32"), strict=False):
        _table(view, dtype, outputs)
    _result(step.output, rows, outputs, y_tiles)


def _heads(
    step: Step, dtypes: Sequence[Sequence[str]] = (("float32",),) * 3
) -> tuple[Extent, Extent, Extent, Extent]:
    """[B, H, Lq, D] of an attention's queries; keys, values and result fit them."""
    q, k, v = step.inputs[:3]
    one = Extent(1)
    for view, allowed in zip((q, k, v), dtypes, strict=True):
        fits = len(view.shape) == 4 and view.dtype in allowed
        require(fits, f"4-D operands of {' or '.join(allowed)}")
        require(view.strides[3] == one or view.shape[3] == one, "contiguous heads")
    batch, heads, queries, dims = q.shape
    require(bool(dims.number), "heads of a fixed size")
    require(k.shape == v.shape == (batch, heads, k.shape[2], dims), "keys like the queries")
    if dtypes[0] == ("float32",):
        _dense(step.output, "float32")
    whole = product(step.output.shape) == product((batch, queries, heads, dims))
    require(whole, "a result of the queries' size")
    return batch, heads, queries, dims


def _attention(step: Step) -> None:
    _counts(step, (3, 4), 1, 1)
    _flags(step.integers[0])
    require(len(step.inputs) == 3 + step.integers[0], "lengths, or none, as the step says")
    batch = _heads(step)[0]
    if step.integers[0]:
        lengths = step.inputs[3]
        require(lengths.dtype == "int64" and lengths.shape == (batch,), "a length a sequence")


def _causal_attention(step: Step) -> None:
    _counts(step, (3,), 0, 1)
    _, _, queries, dims = _heads(step)
    require(step.inputs[1].shape[2] == queries, "as many keys as queries")
    require(dims.coefficient <= _MAX_HEAD_DIM, f"heads of at most {_MAX_HEAD_DIM}")


def _masked_attention(step: Step) -> None:
    _counts(step, (3, 4), 4, 1)
    _flags(*step.integers)
    require(not (step.integers[1] and step.integers[2]), "a causal mask, or one that caps")
    require(len(step.inputs) == 3 + step.integers[0], "a mask, or none, as the step says")
    batch, heads, queries, _ = _heads(step)
    if step.integers[0]:
        mask, keys = step.inputs[3], step.inputs[1].shape[2]
        fits = mask.dtype == "float32" and mask.shape == (batch, heads, queries, keys)
        require(fits, "a float32 mask of a number a score")
        require(mask.strides[3] == Extent(1) or keys == Extent(1), "contiguous rows of the mask")


def _reduce(step: Step) -> None:
    _counts(step, (1,), 1, 0)
    require(0 <= step.integers[0] < _REDUCTIONS, "a known reduction")
    x = _middle(step, step.integers[0] != _MEAN)
    require(product(step.output.shape) == x.shape[0] * x.shape[2], "a result of the outer sizes")


def _middle(step: Step, integers: bool) -> View:
    """x of a step along its middle dimension; the result is of its dtype."""
    (x,) = step.inputs
    _dense(x, "float32", *(["int64"] if integers else []))
    require(len(x.shape) == 3, "an operand of three dimensions")
    _dense(step.output, x.dtype)
    return x


def _cumsum(step: Step) -> None:
    _counts(step, (1,), 0, 0)
    x = _middle(step, True)
    require(product(step.output.shape) == product(x.shape), "a result of the operand's size")


def _grouped_linear(step: Step) -> None:
    _counts(step, (2, 3), 2, 0)
    bias, _ = step.integers
    _flags(*step.integers)
    require(len(step.inputs) == 2 + bias, "a bias, or none, as the step says")
    x = step.inputs[0]
    rows, width = _rows(x)
    _dense(x, "float32")
    outputs = _groups(step.inputs[1], width, step.inputs[2:])
    _result(step.output, rows, outputs, 0)
    _dense(step.output, "float32")


def _groups(weight: View, width: int, bias: Sequence[View]) -> int:
    """Outputs of a constant weight [G, O, I] for rows of this width, and of its bias."""
    require(len(weight.shape) == 3, "a weight of three dimensions")
    groups, outputs, inputs = (size.coefficient for size in weight.shape)
    require(min(groups, outputs, inputs) > 0, "groups of weights")
    require(groups * inputs == width, "as many inputs as the weight has")
    _table(weight, "float32", groups, outputs, inputs)
    for view in bias:
        _table(view, "float32", groups * outputs)
    return groups * outputs


def _lengths(view: View, batch: Extent) -> None:
    _dense(view, "int64")
    require(view.shape == (batch,), "a length a sequence")


def _separable_projection(step: Step) -> None:
    _counts(step, (3, 4, 5), 3, 0)
    bias, lengths, before = step.integers
    _flags(bias, lengths)
    require(len(step.inputs) == 3 + bias + lengths, "a bias and lengths, as the step says")
    x, depthwise, pointwise = step.inputs[:3]
    require(len(x.shape) == 3 and x.dtype == "float32", "sequences of float32")
    require(x.strides[2] == Extent(1) or x.shape[2] == Extent(1), "contiguous channels")
    rows, width = _rows(x)
    require(len(depthwise.shape) == 2, "taps of two dimensions")
    taps = depthwise.shape[1].coefficient
    require(0 < taps <= _MAX_TAPS and 0 <= before < taps, f"at most {_MAX_TAPS} taps")
    _table(depthwise, "float32", width, taps)
    outputs = _groups(pointwise, width, step.inputs[3 : 3 + bias])
    if lengths:
        _lengths(step.inputs[3 + bias], x.shape[0])
    _result(step.output, rows, outputs, 0)
    _dense(step.output, "float32")


def _window_sparse_attention(step: Step) -> None:
    require(len(step.integers) > 3, "a pattern")
    _counts(step, (3, 4), len(step.integers), 1)
    _, _, queries, _ = _heads(step)
    require(step.inputs[1].shape[2] == queries, "as many keys as queries")
    _pattern(step, step.integers)


def _window_sparse_attention_int8(step: Step) -> None:
    require(len(step.integers) > 5, "a pattern and zero points")
    _counts(step, (3, 4), len(step.integers), 3)
    pattern, zero_points = step.integers[:4] + step.integers[6:], step.integers[4:6]
    byte = ("uint8", "int8")
    batch, heads, queries, dims = _heads(step, (byte, byte, (*byte, "float32")))
    require(heads.number is not None, "a fixed number of heads")
    _dense(step.output, "float32", "uint8")
    require(step.output.shape == (batch, queries, heads, dims), "a result [B, L, H, D]")
    require(all(0 <= zero <= 255 for zero in zero_points), "zero points of a byte")
    exponent, v_scale, out_scale = step.numbers
    require(0 <= exponent <= _MAX_SCALE and 0 <= v_scale <= _MAX_SCALE, "scales of 0 or more")
    require(1 / _MAX_SCALE <= out_scale <= _MAX_SCALE, "a scale of the result above 0")
    _pattern(step, pattern)


def _sums_fit(step: Step, spec: InputSpec) -> None:
    """The weighted sums of so many keys are int32."""
    _, _, window, lists, _, _, *rest = step.integers
    far = 0
    for _ in range(lists):
        far, rest = max(far, rest[0]), rest[1 + rest[0] :]
    keys = step.inputs[1].shape[2]
    limits = {s: spec.limits.get(s, (1, None))[1] for s in keys.symbols}
    most = keys.at({s: _MAX_KEYS + 1 if high is None else high for s, high in limits.items()})
    require(min(most, 2 * window + 1) + 2 * far <= _MAX_KEYS, f"at most {_MAX_KEYS} keys a query")


def _pattern(step: Step, integers: Sequence[int]) -> None:
    has_lengths, causal, window, lists, *rest = integers
    _flags(has_lengths, causal)
    require(len(step.inputs) == 3 + has_lengths, "lengths, or none, as the step says")
    batch, heads, _, dims = step.inputs[0].shape
    require(dims.coefficient <= _MAX_HEAD_DIM, f"heads of at most {_MAX_HEAD_DIM}")
    if has_lengths:
        _lengths(step.inputs[3], batch)
    require(0 <= window < _MAX_DISTANCE, "a window")
    require(lists == 1 or heads == Extent(lists), "one list of distances, or one a head")
    for _ in range(lists):
        require(bool(rest) and 0 <= rest[0] < len(rest), "lists of distances")
        distances, rest = [window, *rest[1 : 1 + rest[0]], _MAX_DISTANCE], rest[1 + rest[0] :]
        rising = all(a < b for a, b in itertools.pairwise(distances))
        require(rising, "distances that rise beyond the window")
    require(not rest, "no more than its distances")


def _quantize(step: Step) -> None:
    _counts(step, (1,), 1, 1)
    _bytes(step.integers[0])
    require(step.numbers[0] > 0, "a scale above 0")
    _dense(step.inputs[0], "float32")
    _dense(step.output, "uint8")
    require(product(step.output.shape) == product(step.inputs[0].shape), "as many elements")


def _matmul(step: Step) -> None:
    _counts(step, (2,), 1, 0)
    _flags(step.integers[0])
    a, b = step.inputs
    rank = len(a.shape)
    require(rank == len(b.shape) >= 2, "as many dimensions, at least 2")
    require(a.dtype == b.dtype == "float32", "matrices of float32")
    require(a.shape[:-2] == b.shape[:-2], "as many matrices")
    require(a.shape[-1] == b.shape[-2], "columns of a for the rows of b")
    one = Extent(1)
    require(a.strides[-1] == one or a.shape[-1] == one, "contiguous rows of a")
    # [K, N], or [N, K] in memory
    outer, inner = (rank - 1, rank - 2) if step.integers[0] else (rank - 2, rank - 1)
    require(b.strides[inner] == one or b.shape[inner] == one, "contiguous matrices of b")
    follow = b.strides[outer] == b.shape[inner] or b.shape[outer] == one
    require(follow, "contiguous matrices of b")
    _dense(step.output, "float32")
    whole = step.output.shape == (*a.shape[:-1], b.shape[-1])
    require(whole, "a result of rows of a by columns of b")


def _softmax(step: Step) -> None:
    _counts(step, (1,), 0, 0)
    (x,) = step.inputs
    require(len(x.shape) > 0, "rows of numbers")
    _dense(x, "float32")
    _dense(step.output, "float32")
    require(product(step.output.shape) == product(x.shape), "a result of the operand's size")


_RULES: dict[str, Callable[[Step], None]] = {
    "attention": _attention,
    "causal_attention": _causal_attention,
    "cumsum": _cumsum,
    "gather": _gather,
    "grouped_linear": _grouped_linear,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_bf16": _linear,
    "linear_int8": _linear_int8,
    "map": _map,
    "masked_attention": _masked_attention,
    "matmul": _matmul,
    "quantize": _quantize,
    "reduce": _reduce,
    "separable_projection": _separable_projection,
    "softmax": _softmax,
    "window_sparse_attention": _window_sparse_attention,
    "window_sparse_attention_int8": _window_sparse_attention_int8,
}

"""A program that came from a file, checked before it runs: whatever it says, no kernel may touch
memory outside the buffers, at any sizes. numpy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from fastrec.errors import ArtifactError
from fastrec.runtime.native.bounds import room_behind
from fastrec.runtime.native.buffers import Buffer, Extent, Shape, View, product
from fastrec.runtime.native.passes.keep_tiles import CHUNK
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step
from fastrec.spec import InputSpec

MAX_SYMBOLS, MAX_DIMS, MAX_OPERANDS = 4, 6, 32
_MAX_COEFFICIENT, _MAX_DEGREE = 2**40, 8
# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: the packed weight's sizes, kMaxInputs.
_PANEL, _GROUP, _GROUP_BYTES, _MAX_INPUTS = 32, 4, 128, 65793
# csrc/cpu/window_sparse_attention/window_sparse_attention.h: kMaxDims; sums of positions and
# distances stay far from what 64 bits hold.
_MAX_HEAD_DIM, _MAX_DISTANCE = 256, 2**31
# csrc/cpu/window_sparse_attention_int8/window_sparse_attention_int8.h: kMaxKeys; scales whose
# products with its integers are finite in fp32.
_MAX_KEYS, _MAX_SCALE = 65_536, 1e30
# csrc/cpu/separable_projection/separable_projection.h: kMaxWidth.
_MAX_TAPS = 31


def require(true: bool, what: str) -> None:
    """Raise ArtifactError unless ``true``; ``what`` is what a sound plan has."""
    if not true:
        raise ArtifactError(f"an invalid plan: {what}")


def validate(program: Program, spec: InputSpec) -> None:
    """Refuse a program that the executor must not see.

    Raises:
        ArtifactError: what is wrong, and in which step.
    """
    require(len(set(program.symbols)) == len(program.symbols) <= MAX_SYMBOLS, "at most 4 symbols")
    require(len(program.inputs) == len(spec.fields) > 0, "an input buffer for each input")
    for buffer, field in zip(program.inputs, spec.fields, strict=True):
        dims = tuple(Extent.of(d) for d in field.dims)
        fits = buffer.shape == dims and buffer.dtype == field.dtype and buffer.space == "input"
        require(fits, f"input {field.name} as its specification says")
    require(all(low >= 1 for low, _ in spec.limits.values()), "sizes of at least 1")
    found = {s.symbols for b in program.inputs for s in b.shape if s.coefficient == 1}
    require(all((s,) in found for s in program.symbols), "each symbol is the size of an input")
    require(not program.more_outputs, "one output")
    _buffer(program.output.buffer, program)
    require(program.output.dtype == "float32" and _whole(program.output), "a whole float32 output")
    written = set(program.inputs)
    for position, step in enumerate(program.steps):
        try:
            _step(program, step, written)
            if step.kind == "window_sparse_attention_int8":
                _sums_fit(step, spec)
        except ArtifactError as error:
            raise ArtifactError(f"{error} (step {position}, {step.kind})") from None
        written.update(v.buffer for v in step.outputs)
    require(program.output.buffer in written, "an output that is computed")


def _step(program: Program, step: Step, written: set[Buffer]) -> None:
    views = [*step.inputs, *step.outputs]
    require(step.kind in _RULES, "a step kind that this version knows")
    require(len(views) <= MAX_OPERANDS, f"at most {MAX_OPERANDS} operands")
    floats = [value for value in step.fields.values() if isinstance(value, float)]
    require(all(map(math.isfinite, floats)), "finite numbers")
    for view in views:
        _buffer(view.buffer, program)
        _inside(view, program)
    for view in step.inputs:
        known = view.buffer in written or view.buffer.data is not None
        require(known, "operands that were computed before they are read")
    for view in step.outputs:
        require(view.buffer.space in ("arena", "output"), "a result that may be written")
        own = view.buffer.space == "arena" or view.buffer is program.output.buffer
        require(own, "no other output than the plan's")
    _RULES[step.kind](step)


def _extents(extents: Shape, program: Program) -> None:
    require(len(extents) <= MAX_DIMS, f"at most {MAX_DIMS} dimensions")
    for e in extents:
        require(0 <= e.coefficient <= _MAX_COEFFICIENT, "sizes and strides of 0 or more")
        require(len(e.symbols) <= _MAX_DEGREE, "sizes of few symbols")
        require(set(e.symbols) <= set(program.symbols), "sizes of known symbols")


def _buffer(buffer: Buffer, program: Program) -> None:
    _extents(buffer.shape, program)
    if buffer.data is not None:
        require(product(buffer.shape) == Extent(buffer.data.size), "constants of their shape")
    elif buffer.space == "input":
        require(buffer in program.inputs, "inputs that the plan has")


def _inside(view: View, program: Program) -> None:
    """Every element of the view is one of its buffer, whatever the sizes."""
    _extents(view.shape, program)
    _extents(view.strides, program)
    require(len(view.shape) == len(view.strides), "a stride for each size")
    require(0 <= view.offset <= _MAX_COEFFICIENT, "offsets of 0 or more")
    if any(size.coefficient == 0 for size in view.shape):
        require(view.offset == 0, "empty operands at the start of their buffers")
        return
    require(all(c >= 0 for c in room_behind(view).values()), "operands inside their buffers")


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
    out = step.y
    require(out.dtype in ("float32", "int64", "bool"), "maps to float32, int64 or bool")
    for view in step.x:
        require(view.shape == out.shape, "operands expanded to the result's shape")
    for name, *operands in step.program:
        if name == "integer":
            require(abs(operands[0]) < 2**62, "integers of 63 bits")


def _gather(step: Step) -> None:
    ids, table, scale = step.ids, step.table, step.scale
    _dense(ids, "int64")
    require(len(table.shape) == 2, "a table of two dimensions")
    rows, dims = table.shape[0].number, table.shape[1].number
    require(rows is not None and dims is not None, "a table of a fixed size")
    assert rows is not None
    assert dims is not None
    _table(table, "float32" if scale is None else "int8", rows, dims)
    if scale is not None:
        _table(scale, "float32", rows)
    _dense(step.y, "float32")
    whole = product(step.y.shape) == product(ids.shape) * Extent(dims)
    require(whole, "a row for each id")


def _layer_norm(step: Step) -> None:
    _bytes(step.y_zero_point)
    require(step.y_scale > 0, "scales above 0")
    rows, width = _rows(step.x)
    for view in (step.x, step.residual, step.sum):
        if view is not None:
            _dense(view, "float32")
            require(product(view.shape) == rows * Extent(width), "operands of one size")
    for view in (step.weight, step.bias):
        _table(view, "float32", width)
    _result(step.y, rows, width, step.y_tiles)


def _result(y: View, rows: Extent, width: int, tiles: int) -> None:
    _dense(y, "float32", "uint8")
    require(product(y.shape) == rows * Extent(width), "results of the operands' size")
    if tiles:
        _tiles(y, rows, width)


def _linear(step: Step) -> None:
    x, weight = step.x, step.weight
    rows, inputs = _rows(x)
    _dense(x, "float32")
    require(len(weight.shape) == 2, "a weight of two dimensions")
    outputs = weight.shape[0].coefficient
    require(outputs > 0, "outputs")
    _table(weight, "float32", outputs, inputs)
    if step.bias is not None:
        _table(step.bias, "float32", outputs)
    _dense(step.y, "float32")
    _result(step.y, rows, outputs, 0)


def _linear_int8(step: Step) -> None:
    outputs, inputs = step.fields["outputs"], step.fields["inputs"]
    _bytes(step.x_zero_point, step.y_zero_point)
    require(min(step.x_scale, step.y_scale) > 0, "scales above 0")
    require(outputs > 0 and 0 < inputs <= _MAX_INPUTS, "sizes that sums of 32 bits allow")
    x, values, group_index = step.x, step.values, step.group_index
    rows, width = _rows(x)
    require(width == inputs, "as many inputs as the weight has")
    _dense(x, "float32", "uint8")
    if step.x_tiles:
        _tiles(x, rows, width)
    groups = group_index.shape[0].coefficient if group_index.shape else -1
    require(groups >= 0, "groups of weights")
    _table(values, "int8", *((groups, _GROUP_BYTES) if len(values.shape) == 2 else (-1,)))
    index = _table(group_index, "int32", groups)
    panels = -(-outputs // _PANEL)
    start = _table(step.panel_start, "int32", panels + 1)
    require(start[0] == 0 and start[-1] == groups, "panels that own all groups")
    require(bool((np.diff(start) >= 0).all()), "panels one after another")
    reach = -(-inputs // _GROUP)
    require(bool(((index >= 0) & (index < reach)).all()), "groups among the inputs")
    per_output = ((step.w_scale, "float32"), (step.w_sum, "int32"), (step.bias, "float32"))
    for view, dtype in per_output:
        if view is not None:
            _table(view, dtype, outputs)
    _result(step.y, rows, outputs, step.y_tiles)


def _heads(
    step: Step, dtypes: Sequence[Sequence[str]] = (("float32",),) * 3
) -> tuple[Extent, Extent, Extent, Extent]:
    """[B, H, Lq, D] of an attention's queries; keys, values and result fit them."""
    q, k, v = step.q, step.k, step.v
    one = Extent(1)
    for view, allowed in zip((q, k, v), dtypes, strict=True):
        fits = len(view.shape) == 4 and view.dtype in allowed
        require(fits, f"4-D operands of {' or '.join(allowed)}")
        require(view.strides[3] == one or view.shape[3] == one, "contiguous heads")
    batch, heads, queries, dims = q.shape
    require(bool(dims.number), "heads of a fixed size")
    require(k.shape == v.shape == (batch, heads, k.shape[2], dims), "keys like the queries")
    if dtypes[0] == ("float32",):
        _dense(step.y, "float32")
    whole = product(step.y.shape) == product((batch, queries, heads, dims))
    require(whole, "a result of the queries' size")
    return batch, heads, queries, dims


def _attention(step: Step) -> None:
    batch = _heads(step)[0]
    if step.lengths is not None:
        lengths = step.lengths
        require(lengths.dtype == "int64" and lengths.shape == (batch,), "a length a sequence")


def _causal_attention(step: Step) -> None:
    _, _, queries, dims = _heads(step)
    require(step.k.shape[2] == queries, "as many keys as queries")
    require(dims.coefficient <= _MAX_HEAD_DIM, f"heads of at most {_MAX_HEAD_DIM}")


def _masked_attention(step: Step) -> None:
    require(not (step.causal and step.caps), "a causal mask, or one that caps")
    batch, heads, queries, _ = _heads(step)
    if step.mask is not None:
        mask, keys = step.mask, step.k.shape[2]
        fits = mask.dtype == "float32" and mask.shape == (batch, heads, queries, keys)
        require(fits, "a float32 mask of a number a score")
        require(mask.strides[3] == Extent(1) or keys == Extent(1), "contiguous rows of the mask")


def _reduce(step: Step) -> None:
    x = _middle(step, step.operation != "mean")
    require(product(step.y.shape) == x.shape[0] * x.shape[2], "a result of the outer sizes")


def _middle(step: Step, integers: bool) -> View:
    """x of a step along its middle dimension; the result is of its dtype."""
    x: View = step.x
    _dense(x, "float32", *(["int64"] if integers else []))
    require(len(x.shape) == 3, "an operand of three dimensions")
    _dense(step.y, x.dtype)
    return x


def _cumsum(step: Step) -> None:
    x = _middle(step, True)
    require(product(step.y.shape) == product(x.shape), "a result of the operand's size")


def _grouped_linear(step: Step) -> None:
    rows, width = _rows(step.x)
    _dense(step.x, "float32")
    outputs = _groups(step.weight, width, step.bias)
    _result(step.y, rows, outputs, 0)
    _dense(step.y, "float32")


def _groups(weight: View, width: int, bias: View | None) -> int:
    """Outputs of a constant weight [G, O, I] for rows of this width, and of its bias."""
    require(len(weight.shape) == 3, "a weight of three dimensions")
    groups, outputs, inputs = (size.coefficient for size in weight.shape)
    require(min(groups, outputs, inputs) > 0, "groups of weights")
    require(groups * inputs == width, "as many inputs as the weight has")
    _table(weight, "float32", groups, outputs, inputs)
    if bias is not None:
        _table(bias, "float32", groups * outputs)
    return groups * outputs


def _lengths(view: View, batch: Extent) -> None:
    _dense(view, "int64")
    require(view.shape == (batch,), "a length a sequence")


def _separable_projection(step: Step) -> None:
    x, depthwise, before = step.x, step.depthwise, step.before
    require(len(x.shape) == 3 and x.dtype == "float32", "sequences of float32")
    require(x.strides[2] == Extent(1) or x.shape[2] == Extent(1), "contiguous channels")
    rows, width = _rows(x)
    require(len(depthwise.shape) == 2, "taps of two dimensions")
    taps = depthwise.shape[1].coefficient
    require(0 < taps <= _MAX_TAPS and 0 <= before < taps, f"at most {_MAX_TAPS} taps")
    _table(depthwise, "float32", width, taps)
    outputs = _groups(step.pointwise, width, step.bias)
    if step.lengths is not None:
        _lengths(step.lengths, x.shape[0])
    _result(step.y, rows, outputs, 0)
    _dense(step.y, "float32")


def _window_sparse_attention(step: Step) -> None:
    _, _, queries, _ = _heads(step)
    require(step.k.shape[2] == queries, "as many keys as queries")
    _pattern(step)


def _window_sparse_attention_int8(step: Step) -> None:
    byte = ("uint8", "int8")
    batch, heads, queries, dims = _heads(step, (byte, byte, (*byte, "float32")))
    require(heads.number is not None, "a fixed number of heads")
    _dense(step.y, "float32", "uint8")
    require(step.y.shape == (batch, queries, heads, dims), "a result [B, L, H, D]")
    _bytes(step.q_zero_point, step.y_zero_point)
    exponent, v_scale, out_scale = step.exponent_scale, step.v_scale, step.y_scale
    require(0 <= exponent <= _MAX_SCALE and 0 <= v_scale <= _MAX_SCALE, "scales of 0 or more")
    require(1 / _MAX_SCALE <= out_scale <= _MAX_SCALE, "a scale of the result above 0")
    _pattern(step)


def _sums_fit(step: Step, spec: InputSpec) -> None:
    """The weighted sums of so many keys are int32."""
    far = max(map(len, step.distances))
    keys = step.k.shape[2]
    limits = {s: spec.limits.get(s, (1, None))[1] for s in keys.symbols}
    most = keys.at({s: _MAX_KEYS + 1 if high is None else high for s, high in limits.items()})
    require(
        min(most, 2 * step.window + 1) + 2 * far <= _MAX_KEYS, f"at most {_MAX_KEYS} keys a query"
    )


def _pattern(step: Step) -> None:
    batch, heads, _, dims = step.q.shape
    require(dims.coefficient <= _MAX_HEAD_DIM, f"heads of at most {_MAX_HEAD_DIM}")
    if step.lengths is not None:
        _lengths(step.lengths, batch)
    require(0 <= step.window < _MAX_DISTANCE, "a window")
    lists = len(step.distances)
    require(lists == 1 or heads == Extent(lists), "one list of distances, or one a head")
    require(lists > 0, "lists of distances")
    for distances in step.distances:
        rising = itertools.pairwise([step.window, *distances, _MAX_DISTANCE])
        require(all(a < b for a, b in rising), "distances that rise beyond the window")


def _quantize(step: Step) -> None:
    _bytes(step.zero_point)
    require(step.scale > 0, "a scale above 0")
    _dense(step.x, "float32")
    _dense(step.y, "uint8")
    require(product(step.y.shape) == product(step.x.shape), "as many elements")


def _matmul(step: Step) -> None:
    a, b = step.a, step.b
    rank = len(a.shape)
    require(rank == len(b.shape) >= 2, "as many dimensions, at least 2")
    require(a.dtype == b.dtype == "float32", "matrices of float32")
    require(a.shape[:-2] == b.shape[:-2], "as many matrices")
    require(a.shape[-1] == b.shape[-2], "columns of a for the rows of b")
    one = Extent(1)
    require(a.strides[-1] == one or a.shape[-1] == one, "contiguous rows of a")
    # [K, N], or [N, K] in memory
    outer, inner = (rank - 1, rank - 2) if step.transposed else (rank - 2, rank - 1)
    require(b.strides[inner] == one or b.shape[inner] == one, "contiguous matrices of b")
    follow = b.strides[outer] == b.shape[inner] or b.shape[outer] == one
    require(follow, "contiguous matrices of b")
    _dense(step.y, "float32")
    whole = step.y.shape == (*a.shape[:-1], b.shape[-1])
    require(whole, "a result of rows of a by columns of b")


def _softmax(step: Step) -> None:
    x = step.x
    require(len(x.shape) > 0, "rows of numbers")
    _dense(x, "float32")
    _dense(step.y, "float32")
    require(product(step.y.shape) == product(x.shape), "a result of the operand's size")


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

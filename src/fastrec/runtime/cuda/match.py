"""A plan -> the stages of a ranker, found backwards from the scores.

The plan says what is computed, not which class the model has: any model whose plan has this shape
is taken, whatever its sizes; another one is refused by the name of the step that does not fit.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NoReturn

import numpy as np
import torch

from fastrec.errors import BackendError
from fastrec.kernels.sparse_int8_linear.packed import PackedWeight
from fastrec.kernels.sparse_int8_linear.reference import sparse_int8_linear_reference
from fastrec.runtime.cuda.stages import (
    Block,
    Cross,
    Dense,
    Norm,
    Projection,
    Quantisation,
    RankerStages,
    Term,
)
from fastrec.runtime.native.ir import Buffer, Extent, Plan, Step, View
from fastrec.runtime.native.passes import ACTIVATIONS

_AGE = [("sub_i64", 0, 1), ("integer", 0), ("max_i64", 2, 3)]
_COUNT = [("index", 0), ("integer", 1), ("add_i64", 0, 1)]
_HAS_HISTORY = [("integer", 0), ("lt_i64", 1, 0), ("to_f32", 2)]
_MAX_TERMS = 4


def match(plan: Plan) -> RankerStages:
    """The ranker that a simplified plan computes.

    Raises:
        BackendError: the plan has another shape; the message names the step and what was expected.
    """
    return _Matcher(plan).ranker()


class _Matcher:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.writers = plan.writer()
        self.length: Buffer | None = None

    def refuse(self, found: Step | None, expected: str) -> NoReturn:
        """The error for a step that does not fit."""
        what = "an input or a constant" if found is None else f"a step {found.kind!r}"
        where = f" of module {found.module!r}" if found is not None and found.module else ""
        raise BackendError(
            f"the cuda engine runs plans of lookups, encoder blocks, cross attention and a tower: "
            f"expected {expected}, found {what}{where}"
        )

    def writer(self, view: View, expected: str, *kinds: str) -> Step:
        """The one step that makes a whole buffer."""
        made = self.writers.get(view.buffer, [])
        step = made[0] if made else None
        if step is None or len(made) != 1 or (kinds and step.kind not in kinds):
            self.refuse(step, expected)
        return step

    def ranker(self) -> RankerStages:
        """All of it, from the scores back."""
        score, below = self.dense(self.plan.output, "the tower's last linear layer")
        if score.outputs != 1 or score.activation:
            raise BackendError("the cuda engine needs a linear layer of one score at the end")
        tower: list[Dense] = []
        while len(self.writers.get(below.buffer, [])) == 1:
            layer, below = self.dense(below, "a linear layer of the tower")
            tower.insert(0, layer)
        self.check_tower(tower)
        for layer, after in itertools.pairwise([*tower, score]):
            self.check_linked(layer, after)
        cross, keys = self.cross(below)
        projection, x = self.projection(keys)
        projections = [projection]
        blocks: list[Block] = []
        d = projection.layer.inputs
        while (found := self.block(x)) is not None:
            block, before, x = found
            blocks.insert(0, block)
            projections.insert(0, before)
        terms, history = self.terms(x)
        assert self.length is not None
        candidates = next(t.ids for t in cross.terms if t.ids is not None)
        return RankerStages(
            d,
            self.length.index,
            history,
            candidates,
            terms,
            tuple(projections),
            tuple(blocks),
            cross,
            tuple(tower),
            score,
        )

    def check_tower(self, tower: list[Dense]) -> None:
        """The hidden layers share a kernel: all int8 or none, one activation."""
        if not tower:
            raise BackendError("the cuda engine needs a tower of one hidden layer or more")
        if len({layer.quantised is None for layer in tower}) > 1:
            raise BackendError("the cuda engine needs a tower of int8 hidden layers alone, or none")
        if len({layer.activation for layer in tower}) > 1:
            raise BackendError("the cuda engine needs one activation in a tower's hidden layers")

    @staticmethod
    def check_linked(first: Dense, second: Dense) -> None:
        """uint8 means the same to the layer that hands it on and to the one that takes it."""
        of, to = first.quantised, second.quantised
        if of is None or of.out_scale is None:
            return
        if to is None or (of.out_scale, of.out_zero) != (to.scale, to.zero):
            raise BackendError(
                f"the cuda engine needs {second.module!r} to take uint8 at the scale at which "
                f"{first.module!r} hands it on"
            )

    def dense(self, view: View, expected: str) -> tuple[Dense, View]:
        """The linear layer that makes a view, its activation with it, and its input."""
        step = self.writer(view, expected, "linear", "linear_int8", "map")
        if step.kind == "map":
            activation = ACTIVATIONS.get(step.program[0][0]) if len(step.program) == 1 else None
            if activation is None:
                self.refuse(step, expected)
            layer, below = self.dense(step.inputs[0], expected)
            if layer.activation:
                self.refuse(step, expected)
            return dataclasses.replace(layer, activation=activation), below
        if step.kind == "linear":
            weight = step.inputs[1].constant
            bias = step.inputs[2].constant if step.integers[0] else None
            assert weight is not None
            return Dense(weight, bias, step.integers[1], None, step.module), step.inputs[0]
        outputs, inputs, zero, activation, has_bias, out_zero = step.integers[:6]
        x, values, index, start, scale, _sums, *rest = step.inputs
        parts = [torch.from_numpy(np.array(v.constant)) for v in (values, index, start, scale)]
        packed = PackedWeight.from_parts(*parts, outputs, inputs)  # type: ignore[call-arg]
        quantised = Quantisation(
            step.numbers[0],
            zero,
            packed.scale.numpy(),
            step.numbers[1] if step.output.dtype == "uint8" else None,
            out_zero,
        )
        bias = rest[0].constant if has_bias else None
        weight = packed.unpack().numpy()
        return Dense(weight, bias, activation, quantised, step.module), x

    def norm(self, view: View) -> tuple[Norm, View]:
        """The LayerNorm that makes a view, and its input."""
        step = self.writer(view, "a LayerNorm", "layer_norm")
        weight, bias = step.inputs[1].constant, step.inputs[2].constant
        assert weight is not None
        assert bias is not None
        return Norm(weight, bias, step.numbers[0]), step.inputs[0]

    def projection(self, view: View) -> tuple[Projection, View]:
        """A linear layer of normalised rows, and the rows."""
        layer, normed = self.dense(view, "a projection of normalised rows")
        if layer.activation or (layer.quantised and layer.quantised.out_scale is not None):
            self.refuse(self.writers[view.buffer][0], "a projection that hands on floats")
        norm, x = self.norm(normed)
        return Projection(norm, layer), x

    def attention(self, view: View) -> Step:
        """An attention over padded keys whose lengths are an input."""
        step = self.writer(view, "attention over padded keys", "attention")
        if not step.integers[0] or (lengths := step.inputs[3].buffer).space != "input":
            self.refuse(step, "attention whose lengths are an input")
        if self.length not in (None, lengths):
            self.refuse(step, "one input of lengths")
        self.length = lengths
        return step

    def heads_of(self, view: View, first: int, width: int) -> int:
        """The heads of a view [B, H, L, D] that are columns ``first`` on of rows of ``width``."""
        _, heads, _, dims = (size.number for size in view.shape)
        step = self.writers[view.buffer][0]
        if heads is None or dims is None or view.offset != first:
            self.refuse(step, "heads side by side in a row")
        strides = [stride.number for stride in view.strides]
        if strides[2:] != [width, 1] or (heads > 1 and strides[1] != dims):
            self.refuse(step, "heads side by side in a row")
        return heads

    def block(self, x: View) -> tuple[Block, Projection, View] | None:
        """The encoder block that makes x, what feeds its attention, and its input; None where x is
        a sum of lookups."""
        step = self.writer(x, "an encoder block or a sum of lookups")
        if step.kind != "map" or step.program != [("add_f32", 0, 1)]:
            return None
        halves = [self.writers.get(v.buffer, [None])[0] for v in step.inputs]
        if halves[1] is None or halves[1].kind not in ("linear", "linear_int8"):
            return None
        if halves[0] is None or halves[0].kind != "map":
            return None
        second, hidden = self.dense(step.inputs[1], "the second half of an encoder block")
        first, normed = self.dense(hidden, "the first layer of a feed-forward part")
        self.check_linked(first, second)
        norm, middle = self.norm(normed)
        if middle.buffer is not step.inputs[0].buffer:
            self.refuse(step, "a residual sum around the feed-forward part")
        inner = self.writer(middle, "a residual sum around attention", "map")
        if inner.program != [("add_f32", 0, 1)]:
            self.refuse(inner, "a residual sum around attention")
        out, context = self.dense(inner.inputs[1], "the output projection of an attention")
        attention = self.attention(context)
        q, k, v = attention.inputs[:3]
        d = out.outputs
        heads = [self.heads_of(view, i * d, 3 * d) for i, view in enumerate((q, k, v))]
        if len({view.buffer for view in (q, k, v)}) != 1 or len(set(heads)) != 1:
            self.refuse(attention, "q, k and v of one projection")
        before, source = self.projection(q)
        if source.buffer is not inner.inputs[0].buffer:
            self.refuse(inner, "a residual sum around attention")
        block = Block(attention.numbers[0], heads[0], out, norm, first, second)
        return block, before, source

    def cross(self, z: View) -> tuple[Cross, View]:
        """What makes [candidate, context, candidate * context], and the view of the keys."""
        parts = sorted(self.writers.get(z.buffer, []), key=lambda step: step.output.offset)
        programs = [step.program for step in parts]
        if programs != [[], [], [("mul_f32", 0, 1)]] or any(s.kind != "map" for s in parts):
            self.refuse(parts[0] if parts else None, "[candidate, context, candidate * context]")
        candidate, context = parts[0].inputs[0], parts[1].inputs[0]
        if {v.buffer for v in parts[2].inputs} != {candidate.buffer, context.buffer}:
            self.refuse(parts[2], "candidate * context")
        gate = self.writer(context, "a context that is 0 without history", "map")
        if gate.program != [("mul_f32", 0, 1)]:
            self.refuse(gate, "a context that is 0 without history")
        out, mixed = self.dense(gate.inputs[0], "the output projection of the cross attention")
        attention = self.attention(mixed)
        has = self.writer(gate.inputs[1], "whether there is a history", "map")
        if has.program != _HAS_HISTORY or has.inputs[0].buffer is not self.length:
            self.refuse(has, "whether there is a history")
        q, k, v = attention.inputs[:3]
        d = out.outputs
        if [s.output.offset for s in parts] != [0, d, 2 * d] or k.buffer is not v.buffer:
            self.refuse(attention, "k and v of one projection")
        heads = [self.heads_of(q, 0, d), self.heads_of(k, 0, 2 * d), self.heads_of(v, d, 2 * d)]
        if len(set(heads)) != 1:
            self.refuse(attention, "as many heads of q, k and v")
        query, normed = self.dense(q, "the projection of the candidates")
        norm, x = self.norm(normed)
        if normed.buffer is not candidate.buffer:
            self.refuse(parts[0], "the candidates that are attended from")
        terms, _ = self.terms(x)
        return Cross(terms, norm, query, attention.numbers[0], heads[0], out), k

    def terms(self, x: View) -> tuple[tuple[Term, ...], int]:
        """The lookups whose sum is x, and one of the inputs that hold their ids."""
        step = self.writer(x, "a sum of lookups", "map", "gather", "linear", "linear_int8")
        sums = [step.output]
        if step.kind == "map":
            if any(name != "add_f32" for name, *_ in step.program):
                self.refuse(step, "a sum of lookups")
            sums = step.inputs
        if len(sums) > _MAX_TERMS:
            self.refuse(step, f"at most {_MAX_TERMS} lookups in a sum")
        terms = tuple(self.term(view) for view in sums)
        ids = [term.ids for term in terms if term.ids is not None]
        if not ids:
            self.refuse(step, "a lookup by ids")
        return terms, ids[0]

    def term(self, view: View) -> Term:
        """A lookup; a projection of one is folded into its table, row by row."""
        step = self.writer(view, "a lookup", "gather", "linear", "linear_int8")
        layer = None
        if step.kind != "gather":
            layer, below = self.dense(view, "a projected lookup")
            step = self.writer(below, "a lookup", "gather")
        ids, table, *scales = step.inputs
        rows, scale = table.constant, scales[0].constant if scales else None
        assert rows is not None
        if layer is not None:
            rows, scale = _projected(layer, rows, scale), None
        if ids.buffer.space == "input":
            return Term(ids.buffer.index, rows, scale)
        age = self.writer(ids, "ids that are an input or ages", "map")
        if age.program != _AGE or not self.counts(age.inputs[1]):
            self.refuse(age, "ids that are an input or ages")
        if age.inputs[0].buffer.space != "input" or age.inputs[0].strides[1] != Extent(0):
            self.refuse(age, "ages counted from the lengths")
        return Term(None, rows, scale)

    def counts(self, positions: View) -> bool:
        """Whether a view holds 1, 2, .. L along its last dimension."""
        if positions.constant is not None:
            row = positions.constant.reshape(-1, positions.constant.shape[-1])[0]
            return bool(np.array_equal(row, np.arange(1, len(row) + 1)))
        made = self.writers.get(positions.buffer, [])
        return len(made) == 1 and made[0].program == _COUNT


def _projected(layer: Dense, table: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The layer of every row of a table, float32 [rows, d]; exact integers where it is int8."""
    rows = torch.from_numpy(np.array(table, np.float32))
    if scale is not None:
        rows = rows * torch.from_numpy(np.array(scale))[:, None]
    bias = None if layer.bias is None else torch.from_numpy(np.array(layer.bias))
    weight = torch.from_numpy(np.array(layer.weight))
    if layer.quantised is None:
        projected = torch.nn.functional.linear(
            rows.double(), weight.double(), None if bias is None else bias.double()
        ).float()
    else:
        packed = PackedWeight.pack(weight, torch.from_numpy(layer.quantised.weight_scale))
        projected = sparse_int8_linear_reference(
            rows,
            packed,
            x_scale=layer.quantised.scale,
            x_zero_point=layer.quantised.zero,
            bias=bias,
        )
    return projected.numpy()

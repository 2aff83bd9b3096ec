"""A program -> the stages of a ranker, found backwards from the scores.

The program says what is computed, not which class the model has: any model whose program has this
form is taken, at any sizes; another one is refused by the name of the step that does not fit.
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
from fastrec.runtime.native.buffers import Buffer, Extent, View
from fastrec.runtime.native.passes.fuse_activations import activation_of
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import ACTIVATIONS, Instruction, Step

_AGE = (("sub_i64", 0, 1), ("integer", 0), ("max_i64", 2, 3))
_COUNT = (("index", 0), ("integer", 1), ("add_i64", 0, 1))
_HAS_HISTORY = (("integer", 0), ("lt_i64", 1, 0), ("to_f32", 2))
_SUM, _PRODUCT = ("add_f32", 0, 1), ("mul_f32", 0, 1)
_MAX_TERMS = 4


def match(program: Program) -> RankerStages:
    """The ranker that a simplified program computes.

    Raises:
        BackendError: the program has another form; the message names the step that was expected.
    """
    return _Matcher(program).ranker()


class _Matcher:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.writers = program.writers()
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
        """All stages, from the scores back."""
        score, below = self.dense(self.program.output, "the tower's last linear layer")
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
        """Refuse layers that quantise the uint8 between them differently."""
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
            activation = activation_of(step)
            if activation is None:
                self.refuse(step, expected)
            layer, below = self.dense(step.x[0], expected)
            if layer.activation:
                self.refuse(step, expected)
            return dataclasses.replace(layer, activation=ACTIVATIONS.index(activation)), below
        bias = None if step.bias is None else step.bias.constant
        activation_code = ACTIVATIONS.index(step.activation)
        if step.kind == "linear":
            weight = step.weight.constant
            assert weight is not None
            return Dense(weight, bias, activation_code, None, step.module), step.x
        stored = (step.values, step.group_index, step.panel_start, step.w_scale)
        parts = [torch.from_numpy(np.array(view.constant)) for view in stored]
        packed = PackedWeight.from_parts(*parts, step.fields["outputs"], step.fields["inputs"])  # type: ignore[call-arg]
        quantised = Quantisation(
            step.x_scale,
            step.x_zero_point,
            packed.scale.numpy(),
            step.y_scale if step.y.dtype == "uint8" else None,
            step.y_zero_point,
        )
        weight = packed.unpack().numpy()
        return Dense(weight, bias, activation_code, quantised, step.module), step.x

    def norm(self, view: View) -> tuple[Norm, View]:
        """The LayerNorm that makes a view, and its input."""
        step = self.writer(view, "a LayerNorm", "layer_norm")
        return Norm(step.weight.constant, step.bias.constant, step.eps), step.x

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
        if step.lengths is None or (lengths := step.lengths.buffer).space != "input":
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
        """The encoder block that makes x, the projection before it, and its input.

        None where x is a sum of lookups.
        """
        step = self.writer(x, "an encoder block or a sum of lookups")
        if not step.computes(_SUM):
            return None
        residual, feed_forward = (self.writers.get(v.buffer, [None])[0] for v in step.x)
        if feed_forward is None or feed_forward.kind not in ("linear", "linear_int8"):
            return None
        if residual is None or residual.kind != "map":
            return None
        second, hidden = self.dense(step.x[1], "the second half of an encoder block")
        first, normed = self.dense(hidden, "the first layer of a feed-forward part")
        self.check_linked(first, second)
        norm, middle = self.norm(normed)
        if middle.buffer is not step.x[0].buffer:
            self.refuse(step, "a residual sum around the feed-forward part")
        inner = self.writer(middle, "a residual sum around attention", "map")
        if not inner.computes(_SUM):
            self.refuse(inner, "a residual sum around attention")
        out, context = self.dense(inner.x[1], "the output projection of an attention")
        attention = self.attention(context)
        q, k, v = attention.q, attention.k, attention.v
        d = out.outputs
        heads = [self.heads_of(view, i * d, 3 * d) for i, view in enumerate((q, k, v))]
        if len({view.buffer for view in (q, k, v)}) != 1 or len(set(heads)) != 1:
            self.refuse(attention, "q, k and v of one projection")
        before, source = self.projection(q)
        if source.buffer is not inner.x[0].buffer:
            self.refuse(inner, "a residual sum around attention")
        block = Block(attention.scale, heads[0], out, norm, first, second)
        return block, before, source

    def cross(self, z: View) -> tuple[Cross, View]:
        """The cross attention behind [candidate, context, candidate * context], and its keys."""
        parts = sorted(self.writers.get(z.buffer, []), key=lambda step: step.y.offset)
        programs: list[tuple[Instruction, ...]] = [(), (), (_PRODUCT,)]
        fits = len(parts) == 3 and all(s.computes(*p) for s, p in zip(parts, programs, strict=True))
        if not fits:
            self.refuse(parts[0] if parts else None, "[candidate, context, candidate * context]")
        (candidate,), (context,) = parts[0].x, parts[1].x
        if {v.buffer for v in parts[2].x} != {candidate.buffer, context.buffer}:
            self.refuse(parts[2], "candidate * context")
        gate = self.writer(context, "a context that is 0 without history", "map")
        if not gate.computes(_PRODUCT):
            self.refuse(gate, "a context that is 0 without history")
        out, mixed = self.dense(gate.x[0], "the output projection of the cross attention")
        attention = self.attention(mixed)
        has = self.writer(gate.x[1], "whether there is a history", "map")
        if not has.computes(*_HAS_HISTORY) or has.x[0].buffer is not self.length:
            self.refuse(has, "whether there is a history")
        q, k, v = attention.q, attention.k, attention.v
        d = out.outputs
        if [s.y.offset for s in parts] != [0, d, 2 * d] or k.buffer is not v.buffer:
            self.refuse(attention, "k and v of one projection")
        heads = [self.heads_of(q, 0, d), self.heads_of(k, 0, 2 * d), self.heads_of(v, d, 2 * d)]
        if len(set(heads)) != 1:
            self.refuse(attention, "as many heads of q, k and v")
        query, normed = self.dense(q, "the projection of the candidates")
        norm, x = self.norm(normed)
        if normed.buffer is not candidate.buffer:
            self.refuse(parts[0], "the candidates that are attended from")
        terms, _ = self.terms(x)
        return Cross(terms, norm, query, attention.scale, heads[0], out), k

    def terms(self, x: View) -> tuple[tuple[Term, ...], int]:
        """The lookups whose sum is x, and one of the inputs that hold their ids."""
        step = self.writer(x, "a sum of lookups", "map", "gather", "linear", "linear_int8")
        sums = [step.y]
        if step.kind == "map":
            if any(name != "add_f32" for name, *_ in step.program):
                self.refuse(step, "a sum of lookups")
            sums = step.x
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
        ids, rows = step.ids, step.table.constant
        scale = None if step.scale is None else step.scale.constant
        assert rows is not None
        if layer is not None:
            rows, scale = _projected(layer, rows, scale), None
        if ids.buffer.space == "input":
            return Term(ids.buffer.index, rows, scale)
        age = self.writer(ids, "ids that are an input or ages", "map")
        if not age.computes(*_AGE) or not self.counts(age.x[1]):
            self.refuse(age, "ids that are an input or ages")
        if age.x[0].buffer.space != "input" or age.x[0].strides[1] != Extent(0):
            self.refuse(age, "ages counted from the lengths")
        return Term(None, rows, scale)

    def counts(self, positions: View) -> bool:
        """Whether a view holds 1, 2, ... L along its last dimension."""
        if positions.constant is not None:
            row = positions.constant.reshape(-1, positions.constant.shape[-1])[0]
            return bool(np.array_equal(row, np.arange(1, len(row) + 1)))
        made = self.writers.get(positions.buffer, [])
        return len(made) == 1 and made[0].computes(*_COUNT)


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

"""Steps of a native program: named operands and fields, checked when they are set."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fastrec.kernels._compiled import native
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Buffer, Extent, View


def view(*sizes: int, dtype: str = "float32") -> View:
    return Buffer(dtype, tuple(map(Extent, sizes))).view()


def linear(**changed: Any) -> steps.Step:
    named = {"x": view(3, 4), "weight": view(5, 4), "y": view(3, 5), "activation": "relu"}
    return steps.linear(**{**named, **changed})


def test_operands_and_fields_are_attributes() -> None:
    x, weight, y = view(3, 4), view(5, 4), view(3, 5)
    step = steps.linear(x=x, weight=weight, y=y, activation="none", module="tower.0")
    assert (step.kind, step.module, step.activation, step.bias) == (
        "linear", "tower.0", "none", None,
    )  # fmt: skip
    assert step.inputs == (x, weight)
    assert step.outputs == (y,)
    step.bias, step.activation = view(5), "gelu"
    assert step.inputs == (x, weight, step.bias)
    assert step.fields == {"activation": "gelu"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "tanh"}, "none, relu, gelu"),
        ({"weight": None}, "missing weight"),
        ({"x": [view(3, 4)]}, "x takes a view"),
        ({"scale": 1.0}, "has no scale"),
    ],
)
def test_wrong_names_and_values_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        linear(**changed)
    step = linear()
    ((name, value),) = changed.items()
    with pytest.raises((TypeError, AttributeError), match=f"{message}|has no 'scale'"):
        setattr(step, name, value)


def test_missing_fields_and_unknown_kinds_raise() -> None:
    with pytest.raises(TypeError, match="causal_attention: missing scale"):
        steps.causal_attention(q=view(1), k=view(1), v=view(1), y=view(1))
    with pytest.raises(AttributeError, match="no kind of step 'warp'"):
        _ = steps.warp
    with pytest.raises(AttributeError, match="a step 'linear' has no 'alpha'"):
        _ = linear().alpha


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("shuffle", 1, "a flag"),
        ("eps", True, "a number"),
        ("y_zero_point", 0.0, "an integer"),
        ("y_zero_point", True, "an integer"),
    ],
)
def test_fields_keep_their_types(field: str, value: Any, wanted: str) -> None:
    x = view(2, 4)
    made = {
        "shuffle": lambda: steps.grouped_linear(x=x, weight=x, y=x, shuffle=False),
    }.get(
        field,
        lambda: steps.layer_norm(
            x=x, weight=x, bias=x, y=x, eps=0.1, y_scale=1, y_zero_point=0, y_tiles=False
        ),
    )()
    with pytest.raises(TypeError, match=f"{field} takes {wanted}"):
        setattr(made, field, value)


def test_what_is_written_stands_apart_from_what_is_read() -> None:
    x, residual, total, y = (view(2, 4) for _ in range(4))
    step = steps.layer_norm(
        x=x,
        residual=residual,
        weight=view(4),
        bias=view(4),
        sum=total,
        y=y,
        eps=1e-5,
        y_scale=1.0,
        y_zero_point=0,
        y_tiles=False,
    )
    assert step.inputs[:2] == (x, residual)
    assert step.outputs == (total, y)


def test_operands_are_replaced_everywhere() -> None:
    x, other = view(2, 3), view(2, 3)
    step = steps.map(x=[x, other, x], y=view(2, 3), program=[("add_f32", 0, 1)])
    new = view(2, 3)
    changed = step.copy()
    changed.replace_operand(x, new)
    assert changed.x == [new, other, new]
    assert step.x == [x, other, x]
    assert step.reads(x.buffer) == [x]
    assert not step.is_copy
    assert step.computes(("add_f32", 0, 1))


def test_kernels_say_which_strides_they_read() -> None:
    q, k, v = (view(1, 2, 6, 4) for _ in range(3))
    lengths = view(1, dtype="int64")
    step = steps.attention(q=q, k=k, v=v, lengths=lengths, y=view(1, 6, 2, 4), scale=1.0)
    swapped = view(1, 6, 2, 4).permuted((0, 2, 1, 3))
    columns = view(1, 2, 4, 6).permuted((0, 1, 3, 2))
    assert step.accepts(q, swapped)
    assert not step.accepts(q, columns)
    rows = view(3, 4)
    transposed = view(4, 3).permuted((1, 0))
    assert not linear(x=rows).accepts(rows, transposed)
    copied = steps.map(x=[rows], y=view(3, 4), program=[])
    assert copied.accepts(rows, transposed)


def test_steps_can_be_copied_deeply() -> None:
    step = copy.deepcopy(linear())
    assert step.kind == "linear"
    assert step.x.shape == (Extent(3), Extent(4))


def test_every_kind_names_its_operands_and_fields() -> None:
    for row in native().engine.KINDS:
        info = steps.kind_info(row["name"])
        assert row["users"] in ("mixed", "apart", "apart_of_two")
        assert info.operands[-1].name == "y"
        assert info.operands[-1].output
        for field in info.fields:
            assert field.type in ("flag", "integer", "number", "choice", "lists", "program")
            assert bool(field.choices) == (field.type == "choice")

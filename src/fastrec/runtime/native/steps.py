"""Steps of a program: a kind, its operands and its fields, all by name.

``steps.linear(x=..., weight=..., y=..., activation="none")`` makes a step of the kind ``linear``; a
name that the kind does not have, or that is left out, raises. Operands and fields are attributes of
the step: ``step.x``, ``step.activation``. The kinds, their operands and
fields are the compiled engine's (csrc/cpu/engine/steps); passes ask :attr:`Step.kind_info`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrec.kernels import _compiled
from fastrec.runtime.native.buffers import Buffer, View

# One instruction of a map: (name, a, b, c), or ("number" | "integer", value), ("index", dim).
Instruction = tuple[Any, ...]

ACTIVATIONS = ("none", "relu", "gelu")


@dataclass(frozen=True)
class OperandInfo:
    """One operand of a kind.

    Attributes:
        name: the step's attribute.
        optional: whether a step may do without it.
        output: whether the step writes it.
        strided: whether the kernel reads any strides, as long as the last dimension is contiguous.
        many: whether it is a list of views, of any strides.
    """

    name: str
    optional: bool = False
    output: bool = False
    strided: bool = False
    many: bool = False


@dataclass(frozen=True)
class FieldInfo:
    """One field of a kind.

    Attributes:
        name: the step's attribute.
        type: ``flag``, ``integer``, ``number``, ``choice``, ``lists`` (of lists of integers) or
            ``program`` (the instructions of a map).
        choices: the values that a ``choice`` may have.
    """

    name: str
    type: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class KindInfo:
    """A kind of step.

    Attributes:
        name: the kind.
        operands: in the order that the executor takes them, results last.
        fields: its parameters.
    """

    name: str
    operands: tuple[OperandInfo, ...]
    fields: tuple[FieldInfo, ...]


def kind_info(kind: str) -> KindInfo:
    """Operands and fields of a kind.

    Raises:
        KeyError: an unknown kind.
    """
    return _kinds()[kind]


@functools.cache
def _kinds() -> dict[str, KindInfo]:
    return {
        row["name"]: KindInfo(
            row["name"],
            tuple(OperandInfo(**operand) for operand in row["operands"]),
            tuple(FieldInfo(f["name"], f["type"], tuple(f["choices"])) for f in row["fields"]),
        )
        for row in _compiled.native().engine.KINDS
    }


class Step:
    """One call of a kernel.

    An absent operand is None; an operand of any number of views is a list. Operands and fields are
    attributes, and setting one checks it as the constructor does. (``linear_int8`` has fields named
    ``inputs`` and ``outputs``, as the step's views are: they are in ``fields`` alone.)

    Args:
        kind: the name of a kind.
        operands: name -> view; optional ones may be left out.
        fields: name -> value, each that the kind has.
        module: the model's module that it comes from, for people.

    Raises:
        KeyError: an unknown kind.
        TypeError: an unknown or missing name, or a value of another type.
    """

    kind: str
    operands: dict[str, Any]
    fields: dict[str, Any]
    module: str

    def __init__(
        self,
        kind: str,
        operands: Mapping[str, View | Sequence[View] | None],
        fields: Mapping[str, Any],
        module: str = "",
    ) -> None:
        info = kind_info(kind)
        self.__dict__.update(kind=kind, operands={}, fields={}, module=module)
        for operand in info.operands:
            self.operands[operand.name] = _operand(kind, operand, operands.get(operand.name))
        if missing := [f.name for f in info.fields if f.name not in fields]:
            raise TypeError(f"{kind}: missing {', '.join(missing)}")
        for field in info.fields:
            self.fields[field.name] = _field(kind, field, fields[field.name])
        if unknown := (operands.keys() - self.operands.keys()) | (
            fields.keys() - self.fields.keys()
        ):
            raise TypeError(f"{kind} has no {', '.join(sorted(unknown))}")

    @property
    def kind_info(self) -> KindInfo:
        """Operands and fields of its kind."""
        return kind_info(self.kind)

    def __getattr__(self, name: str) -> Any:
        for values in (self.__dict__.get("operands", {}), self.__dict__.get("fields", {})):
            if name in values:
                return values[name]
        raise AttributeError(f"a step {self.__dict__.get('kind')!r} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "module":
            self.__dict__[name] = value
            return
        if not hasattr(type(self), name):
            for operand in self.kind_info.operands:
                if operand.name == name:
                    self.operands[name] = _operand(self.kind, operand, value)
                    return
            for field in self.kind_info.fields:
                if field.name == name:
                    self.fields[name] = _field(self.kind, field, value)
                    return
        raise AttributeError(f"a step {self.kind!r} has no {name!r}")

    def __repr__(self) -> str:
        return f"Step({self.kind!r}, {self.fields}, module={self.module!r})"

    def _named(self) -> list[tuple[OperandInfo, View]]:
        """Each view with the operand that it is."""
        found: list[tuple[OperandInfo, View]] = []
        for operand in self.kind_info.operands:
            value = self.operands[operand.name]
            views = value if operand.many else [] if value is None else [value]
            found += [(operand, view) for view in views]
        return found

    @property
    def inputs(self) -> tuple[View, ...]:
        """All that it reads, in the kind's order."""
        return tuple(view for operand, view in self._named() if not operand.output)

    @property
    def outputs(self) -> tuple[View, ...]:
        """All that it writes, in the kind's order: ``y`` last."""
        return tuple(view for operand, view in self._named() if operand.output)

    @property
    def is_copy(self) -> bool:
        """Whether it is a map that changes nothing, perhaps but the dtype."""
        return self.kind == "map" and not self.program

    def computes(self, *program: Instruction) -> bool:
        """Whether it is a map with exactly these instructions."""
        return self.kind == "map" and self.program == list(program)

    def reads(self, buffer: Buffer) -> list[View]:
        """The different views of a buffer among its inputs."""
        return list(dict.fromkeys(view for view in self.inputs if view.buffer is buffer))

    def accepts(self, old: View, new: View) -> bool:
        """Whether the kernel can read ``new`` wherever the step reads ``old`` now."""
        for operand, view in self._named():
            if operand.output or view != old or operand.many:
                continue
            row_contiguous = new.strides[-1].number == 1 or new.shape[-1].number == 1
            if not (row_contiguous if operand.strided else new.is_contiguous):
                return False
        return True

    def replace_operand(self, old: View, new: View) -> None:
        """Read, or write, ``new`` instead of ``old``."""
        self.map_operands(lambda view: new if view == old else view)

    def map_operands(self, function: Callable[[View], View]) -> None:
        """Replace each view by what ``function`` makes of it."""
        for name, value in self.operands.items():
            if isinstance(value, list):
                self.operands[name] = [function(view) for view in value]
            elif value is not None:
                self.operands[name] = function(value)

    def copy(self) -> Step:
        """A step that can be changed without changing this one."""
        return Step(self.kind, self.operands, self.fields, self.module)


def __getattr__(kind: str) -> Callable[..., Step]:
    """The constructor of a kind: keywords are its operands, its fields, and ``module``.

    Raises:
        TypeError: (by the constructor) an unknown or missing name.
    """
    info = None if kind.startswith("_") else _kinds().get(kind)
    if info is None:
        raise AttributeError(f"there is no kind of step {kind!r}")
    known = {operand.name for operand in info.operands}

    def construct(*, module: str = "", **named: Any) -> Step:
        operands = {name: value for name, value in named.items() if name in known}
        fields = {name: value for name, value in named.items() if name not in known}
        return Step(kind, operands, fields, module)

    return construct


def _operand(kind: str, operand: OperandInfo, value: Any) -> Any:
    if operand.many:
        if isinstance(value, View) or value is None or not all(isinstance(v, View) for v in value):
            raise TypeError(f"{kind}: {operand.name} takes a list of views")
        return list(value)
    if value is None and not operand.optional:
        raise TypeError(f"{kind}: missing {operand.name}")
    if value is not None and not isinstance(value, View):
        raise TypeError(f"{kind}: {operand.name} takes a view, not {value!r}")
    return value


def _field(kind: str, field: FieldInfo, value: Any) -> Any:
    """The value as its field's type."""
    if field.type == "flag" and isinstance(value, bool):
        return value
    if field.type == "integer" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if field.type == "number" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if field.type == "choice" and value in field.choices:
        return value
    if field.type == "lists" and isinstance(value, list | tuple):
        return [[int(item) for item in inner] for inner in value]
    if field.type == "program" and isinstance(value, list | tuple):
        return [tuple(instruction) for instruction in value]
    choices = f" of {', '.join(field.choices)}" if field.choices else ""
    article = "an" if field.type == "integer" else "a"
    raise TypeError(f"{kind}: {field.name} takes {article} {field.type}{choices}, not {value!r}")

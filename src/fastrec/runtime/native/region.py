"""A part of a graph as a native plan, between torch ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fastrec import kernels
from fastrec.runtime.native.buffers import DTYPES
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.piece import is_free
from fastrec.runtime.native.program import Program
from fastrec.spec import InputField, InputSpec


@dataclass(frozen=True)
class RegionInputs:
    """The inputs that a region's plan is given.

    Attributes:
        spec: the plan's inputs.
        symbols: its free sizes.
        names: torch's expression of a size -> the symbol.
        factors: for each dimension of each input the plan's own ones: a size that is a product,
            say of users and events, is taken apart.
    """

    spec: InputSpec
    symbols: tuple[str, ...]
    names: dict[Any, str]
    factors: tuple[tuple[tuple[int | str, ...], ...], ...]


def region_inputs(nodes: Sequence[Node]) -> RegionInputs:
    """The inputs of a region, whose sizes are numbers or torch's expressions."""
    names: dict[Any, str] = {}
    shapes = [tuple(n.meta["val"].shape) for n in nodes]
    free = [s.node.expr for shape in shapes for s in shape if is_free(s)]
    for expression in free:
        if expression.is_Symbol:
            names.setdefault(expression, f"n{len(names)}")

    def factors(size: Any) -> tuple[int | str, ...]:
        if not is_free(size):
            return (int(size),)
        expression = size.node.expr
        if expression not in names:
            number, rest = expression.as_coeff_Mul()
            powers = rest.as_powers_dict()
            if all(base in names and power.is_Integer for base, power in powers.items()):
                symbols = [names[b] for b, power in powers.items() for _ in range(int(power))]
                return (*symbols, int(number)) if number != 1 else tuple(symbols)
            names[expression] = f"n{len(names)}"
        return (names[expression],)

    fields, taken_apart = [], []
    for node, shape in zip(nodes, shapes, strict=True):
        dims = tuple(factors(size) for size in shape)
        taken_apart.append(dims)
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        flat = tuple(size for d in dims for size in d)
        # Of a dtype that no plan has the lowering says so.
        fields.append(InputField(node.name, flat, dtype if dtype in DTYPES else "float32"))
    symbols = tuple(names.values())
    spec = InputSpec(tuple(fields), dict.fromkeys(symbols, (1, None)))
    return RegionInputs(spec, symbols, names, tuple(taken_apart))


class Region(nn.Module):
    """The native plan of a part of a graph; takes and gives tensors.

    Args:
        program: of the part.
        inputs, outputs: the graph's nodes that it reads and gives.
        given: what its plan is given.
        threads: threads that the plan is made for.

    Raises:
        BackendError: the engine cannot hold the program.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        given: RegionInputs,
        threads: int,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.engine = PlanEngine.build(
            program,
            backend="native",
            precision="fp32",
            threads=threads,
            spec=given.spec,
            rows=[],
            versions={},
        )
        self.modules_held = [*dict.fromkeys(s.module for s in program.steps if s.module)]
        self.steps = len(program.steps)
        apart = any(len(own) != 1 for dims in given.factors for own in dims)
        self._factors = given.factors if apart else None
        values = [node.meta["val"] for node in outputs]
        self._dtypes = [value.dtype for value in values]
        # torch ops behind it may rely on the strides that the graph was traced with.
        self._orders = [None if v.is_contiguous() else _order(v) for v in values]

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The outputs: one tensor, or a tuple of them.

        Raises:
            BackendError, IdRangeError: values that the plan does not take; torch may.
        """
        arrays = tuple(
            [(t.detach() if t.requires_grad else t).contiguous().numpy() for t in tensors]
        )
        if self._factors is not None:
            arrays = _taken_apart(arrays, self._factors)
        made = []
        results = self.engine.results(arrays, kernels.num_threads())
        for array, dtype, order in zip(results, self._dtypes, self._orders, strict=True):
            tensor = torch.from_numpy(array)
            if tensor.dtype is not dtype:
                tensor = tensor.to(dtype)
            if order is not None:
                back = [order.index(d) for d in range(len(order))]
                tensor = tensor.permute(order).contiguous().permute(back)
            made.append(tensor)
        return made[0] if len(made) == 1 else tuple(made)


def _taken_apart(
    arrays: Sequence[Any], factors: Sequence[Sequence[tuple[int | str, ...]]]
) -> tuple[Any, ...]:
    """The arrays with the plan's dimensions."""
    sizes: dict[int | str, int] = {}
    for array, dims in zip(arrays, factors, strict=True):
        sizes.update(
            {own[0]: size for own, size in zip(dims, array.shape, strict=True) if len(own) == 1}
        )
    return tuple(
        array.reshape([sizes.get(size, size) for own in dims for size in own])
        for array, dims in zip(arrays, factors, strict=True)
    )


def _order(value: torch.Tensor) -> list[int]:
    """The dimensions of a tensor in the order of its memory."""
    strides = [int(s) if isinstance(s, int) else s.node.hint for s in value.stride()]
    return sorted(range(value.ndim), key=lambda d: -strides[d])

"""Tracing a model with torch.export, as plans and ONNX both do."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import nn

from fastrec.errors import BackendError, FastrecError
from fastrec.models.attention import Attention
from fastrec.spec import InputSpec

# The largest number in a guard, or a size, that is tried for all sizes.
MOST_NUMBER = 64


def traced(
    model: nn.Module, examples: Sequence[torch.Tensor], spec: InputSpec
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The widest export that works: all free sizes, then the batch alone, then none.

    Raises:
        BackendError: torch.export cannot trace the model.
    """
    export, symbols, _ = next(exports(model, examples, spec))
    return export, symbols


def exports(
    model: nn.Module, examples: Sequence[torch.Tensor], spec: InputSpec
) -> Iterator[tuple[torch.export.ExportedProgram, tuple[str, ...], str]]:
    """The exports that work, the widest first; see :func:`traced`.

    Returns:
        each export, its free sizes, and torch's reason why they are not more ("" for the widest).

    Raises:
        BackendError: there is none.
    """
    free: list[str] = []
    for f in spec.fields:
        free += [d for d in f.dims if isinstance(d, str) and d not in free]
    problem: Exception | None = None
    found = False
    for symbols in dict.fromkeys((tuple(free), ("B",) if "B" in free else (), ())):
        declared = {s: torch.export.Dim(s, min=1, max=_most(spec, s)) for s in symbols}
        # What torch cannot prove of all sizes it may find for itself: its guards are then read.
        inferred = dict.fromkeys(symbols, torch.export.Dim.AUTO)
        for dims in (declared, inferred) if symbols else (declared,):
            shapes = tuple(
                {i: dims[d] for i, d in enumerate(f.dims) if isinstance(d, str) and d in dims}
                for f in spec.fields
            )
            with quiet():
                try:
                    program = torch.export.export(
                        model,
                        _apart_from_one(examples, spec, symbols),
                        dynamic_shapes=(shapes,) if _takes_any(model) else shapes,
                    )
                # Tracing runs the model's own code, which may raise anything.
                except Exception as error:
                    problem = problem or error
                    if "satisfy the generated guard" not in str(error):
                        break
                    continue
            if dims is declared or guards_hold(program, spec, symbols):
                found = True
                yield program, symbols, "" if symbols == tuple(free) else first_line(problem)
                break
    if not found:
        assert problem is not None
        raise BackendError(
            f"torch.export can't trace this model: {first_line(problem)}"
        ) from problem


def guards_hold(
    program: torch.export.ExportedProgram, spec: InputSpec, symbols: Sequence[str]
) -> bool:
    """Whether an export with inferred sizes holds for all sizes from 2 on.

    Its inputs have to be free where the spec says so (sizes that the spec counts as one may well be
    several to torch: an input that nothing reads has its own), and each guard has to be one of
    quotients of sizes by small numbers, or by the size itself, that holds for 2..128: those repeat,
    or stay.
    """
    names: dict[Any, str] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    guards: list[Any] = []
    for node, f in zip(placeholders[-len(spec.fields) :], spec.fields, strict=True):
        for size, dim in zip(node.meta["val"].shape, f.dims, strict=True):
            if dim not in symbols:
                continue
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                return False
            if names.setdefault(size.node.expr, str(dim)) != dim:
                return False
            guards = guards_of(size)
    for guard in guards:
        used = list(guard.free_symbols)
        numbers = [abs(int(n)) for n in guard.atoms(sympy.Integer)]
        if (
            len(used) > 1
            or (used and used[0] not in names)
            or max(numbers, default=0) > MOST_NUMBER
        ):
            return False
        for value in range(2, 2 * MOST_NUMBER + 1):
            if guard.subs(dict.fromkeys(used, value)) != sympy.true:
                return False
    return True


def guards_of(size: torch.SymInt) -> list[Any]:
    """The conditions on sizes that an export holds for, in terms of those that are left: sizes that
    turned out equal are one."""
    env = size.node.shape_env
    return [guard.expr.subs(env.replacements) for guard in env.guards]


def _takes_any(model: nn.Module) -> bool:
    """Whether the model's forward takes ``*inputs``, which torch.export describes as one."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _most(spec: InputSpec, symbol: str) -> int:
    high = spec.limits.get(symbol, (1, None))[1]
    return 2**20 if high is None else max(high, 2)


def _apart_from_one(
    examples: Sequence[torch.Tensor], spec: InputSpec, symbols: Sequence[str]
) -> tuple[torch.Tensor, ...]:
    """The examples with every free size of 1 doubled, in order: torch.export takes a 1 for a
    constant, and a view's strides for a constraint on its sizes.
    """
    grown = []
    for f, tensor in zip(spec.fields, examples, strict=True):
        for dim, name in enumerate(f.dims):
            if name in symbols and tensor.shape[dim] == 1:
                tensor = torch.cat((tensor, tensor), dim)
        grown.append(tensor.contiguous())
    return tuple(grown)


def evaluated(model: nn.Module, *, fused: bool = False) -> nn.Module:
    """The model in eval mode, its attention on our kernel (``fused``) or on torch.

    Itself where it is that already, else a copy that shares its tensors.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    ready = all(module.fused == fused for module in attentions)
    if ready and not any(module.training for module in model.modules()):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    kept = {id(v): v.detach() for v in _computed(model)}
    copied: nn.Module = copy.deepcopy(model, memo=kept | shared).eval()
    for module in copied.modules():
        if isinstance(module, Attention):
            module.fused = fused
    return copied


@contextlib.contextmanager
def typed(problem: str) -> Iterator[None]:
    """Whatever torch's tracers raise within as a BackendError that begins with ``problem``: they
    run the model's own code, which may raise anything."""
    try:
        yield
    except FastrecError:
        raise
    except Exception as error:
        raise BackendError(f"{problem}: {first_line(error)}") from error


def owned(model: nn.Module) -> nn.Module:
    """A copy with tensors of its own; what a module keeps of a computation is no longer part of
    it."""
    return copy.deepcopy(model, memo={id(v): v.detach().clone() for v in _computed(model)})


def _computed(model: nn.Module) -> list[torch.Tensor]:
    """Results of computations that modules keep, and torch does not copy: old weight_norm's."""
    kept = [v for module in model.modules() for v in vars(module).values()]
    return [v for v in kept if isinstance(v, torch.Tensor) and not v.is_leaf]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter (deprecations, missing torchvision) away from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def first_line(error: BaseException | None) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch.export's own reason stands below.
    return next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ")

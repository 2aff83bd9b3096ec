"""Why a model, or a part of it, is no plan: the errors, and the words for ops and their places."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fastrec.errors import BackendError
from fastrec.runtime.native.registry import LOWERINGS

# What to write instead of ops that no plan can hold.
_INSTEAD = {
    "nonzero": "a mask: torch.where(condition, x, 0)",
    "masked_select": "a mask: torch.where(condition, x, 0)",
    "masked_scatter": "a mask: torch.where(condition, values, x)",
    "unique": "the ids as they are: a size that depends on values is no plan",
    "unique2": "the ids as they are: a size that depends on values is no plan",
    "bincount": "one_hot(x, n).sum(0)",
    "item": "the tensor itself: a number read from a tensor is no plan",
    "_local_scalar_dense": "the tensor itself: a number read from a tensor is no plan",
    "pack_padded_sequence": "the padded sequence and a mask over the result",
    "_pack_padded_sequence": "the padded sequence and a mask over the result",
}


# Dynamo's words for what ends a graph -> ours, and what to write instead.
_BREAKS = {
    "branching": ("a branch that depends on values", "torch.where(condition, a, b)"),
    "generic_jump": ("a branch that depends on values", "torch.where(condition, a, b)"),
    "item()": ("a number read from a tensor", "the tensor itself"),
    "Dynamic shape": ("a size that depends on values", "a mask: torch.where(condition, x, 0)"),
    "Dynamic slicing": ("a size that depends on values", "a mask: torch.where(condition, x, 0)"),
}


class FreeSize(BackendError):
    """A size that the program cannot leave free, and may hold if it is fixed."""


class Unlowered(BackendError):
    """Ops that no plan can hold.

    Args:
        reasons: node -> why, with the op, its module and its line.
    """

    def __init__(self, reasons: Mapping[torch.fx.Node, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__("; ".join(dict.fromkeys(self.reasons.values())))


def written(node: torch.fx.Node) -> str:
    """The op as the model has it, which torch may have taken apart."""
    return str(node.meta.get("original_aten") or node.target)


def instead(op: str) -> str:
    """The nearest form of an unsupported op."""
    name = op.split(".")[-2] if "." in op else op
    if name in _INSTEAD:
        return f"write {_INSTEAD[name]}"
    known = [str(target) for target in LOWERINGS]
    close = difflib.get_close_matches(op, known, n=3, cutoff=0.6)
    return f"the nearest supported: {', '.join(close) or 'see docs/runtime.md'}"


def module_of(node: torch.fx.Node) -> str:
    """Dotted name of the innermost module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # Dynamo begins with the variable that holds the module.
    return re.sub(r"^L\['\w+'\]\.?", "", str(stack[-1][0])) if stack else ""


def line_of(node: torch.fx.Node) -> str:
    """The line of the model's source that a node comes from: " (file.py:12)", or ""."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" ({Path(found[-1][0]).name}:{found[-1][1]})" if found else ""


def broken(reason: str, where: str) -> str:
    """Why a graph ends within a function, and what to write instead.

    Args:
        reason: dynamo's words.
        where: file and line, in brackets, or "".
    """
    for words, (ours, form) in _BREAKS.items():
        if words in reason:
            return f"{ours}{where}; write {form}"
    return f"{reason}{where}"


def refusal(node: torch.fx.Node, why: str) -> str:
    """Why a node is part of no plan, with its op, its module and its line."""
    where = module_of(node) or "the model's forward"
    return f"native: {written(node)} in {where}{line_of(node)}: {why}"


def no_lowering(node: torch.fx.Node) -> str:
    """The refusal of an op that has no lowering, with the form to write instead."""
    return refusal(node, f"it has no lowering; {instead(written(node))}")

"""Inputs unlike the examples, on which an engine is held against torch before it is handed over.

A tracer may have taken a value or size of the examples for one of all inputs (the longest history,
whether any id is 0, a batch of one). On the examples such an engine is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from fastrec.errors import BackendError, FastrecError
from fastrec.nn import Int8Embedding
from fastrec.spec import InputSpec

# Errors of an engine that answers another question, as shares of the largest score: far beyond
# roundings, which the examples are checked for.
_GROSS = {"fp32": 0.02}
_GROSS_ROUNDED = 0.5


Inputs = tuple[torch.Tensor, ...]


class LookUps(TorchDispatchMode):
    """Sees which inputs of a forward are the ids of a table, whole and as they came.

    Args:
        inputs: of the forward that runs under it.

    Attributes:
        rows: position of an input -> the fewest rows of the tables that it is looked up in.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._places = {(t.data_ptr(), t.numel()): i for i, t in enumerate(inputs) if t.numel()}
        self.rows: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function._schema.name == "aten::embedding":
            self._note(args[1], len(args[0]))
        return function(*args, **(kwargs or {}))

    def watch(self, module: Int8Embedding) -> RemovableHandle:
        """See the module's look-ups too, which go past torch's dispatcher."""
        return module.register_forward_pre_hook(
            lambda own, given: self._note(given[0], own.num_embeddings)
        )

    def _note(self, ids: torch.Tensor, rows: int) -> None:
        place = self._places.get((ids.data_ptr(), ids.numel()))
        if place is not None:
            self.rows[place] = min(self.rows.get(place, rows), rows)

    def bounded(self, spec: InputSpec) -> InputSpec:
        """The spec with the ids' ranges, where it has none: torch refuses ids outside them, where
        ONNX Runtime and OpenVINO answer."""
        fields = [
            dataclasses.replace(f, rows=self.rows[i]) if f.rows is None and i in self.rows else f
            for i, f in enumerate(spec.fields)
        ]
        return InputSpec(tuple(fields), spec.limits)


def unlike(examples: Sequence[torch.Tensor], batch: int) -> Iterator[tuple[str, Inputs]]:
    """Inputs unlike the examples, and what is unlike in them: another batch; short histories
    (zeros from the middle on, and of each third user nothing else); none that is padded."""
    follows = [t.ndim > 0 and t.shape[0] == batch for t in examples]
    rows = torch.zeros(2, dtype=torch.int64) if batch == 1 else torch.zeros(1, dtype=torch.int64)
    other = [t[rows] if own else t for t, own in zip(examples, follows, strict=True)]
    yield f"a batch of {len(rows)}", tuple(other)
    yield "empty and short histories", tuple(map(_emptied, examples))
    yield "histories without padding", tuple(map(_filled, examples))


def _emptied(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    if tensor.ndim:
        changed[::3] = 0
    if tensor.ndim > 1:
        changed[:, tensor.shape[1] // 2 :] = 0
    return changed


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return -tensor
    return torch.where(tensor == 0, tensor.max(), tensor) if tensor.numel() else tensor


def require_agreement(
    name: str,
    engine: Callable[..., torch.Tensor],
    forward: Callable[..., torch.Tensor],
    examples: Sequence[torch.Tensor],
    batch: int,
    precision: str,
) -> None:
    """Hold an engine against torch on inputs unlike the examples.

    What torch's forward does not take says nothing, and neither do scores that are not finite. An
    engine that refuses a call is right.

    Args:
        name: of the backend.
        engine, forward: take tensors, and give scores.
        examples: as compiled.
        batch: of the examples.
        precision: the engine's.

    Raises:
        BackendError: the scores differ by far; the message says on which inputs.
    """
    most = _GROSS.get(precision, _GROSS_ROUNDED)
    for what, inputs in unlike(examples, batch):
        try:
            wanted = forward(*inputs).numpy()
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            continue
        try:
            scores = engine(*inputs).numpy()
        except FastrecError:
            continue
        finite = np.isfinite(wanted)
        if wanted.shape != scores.shape:
            error = f"shape {list(scores.shape)} for {list(wanted.shape)}"
        elif not finite.any() or (
            np.abs(scores[finite] - wanted[finite]).max()
            <= most * max(np.abs(wanted[finite]).max(), 1e-6)
        ):
            continue
        else:
            error = (
                f"{scores[finite].ravel()[:3].tolist()} for {wanted[finite].ravel()[:3].tolist()}"
            )
        raise BackendError(
            f"backend {name!r} disagrees with torch on inputs unlike the examples ({what}): "
            f"{error}. Its tracer took a value or size of the examples for a constant; write what "
            "depends on values (int(length.max()), .item(), `if (ids == 0).any()`, "
            "`if x.shape[0] == 1`) as operations on tensors"
        )

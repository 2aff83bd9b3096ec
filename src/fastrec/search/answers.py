"""Whether a quantised model, or an engine, still gives the answers that the model gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from fastrec.compress.selection import call_model
from fastrec.errors import ArgumentError, DtypeError
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.runtime.engine import Engine
from fastrec.train.evaluation import evaluating

Evaluate = Callable[[nn.Module], float]
MOST = 10


class Answers:
    """A model's answers to some batches, and its quality.

    Args:
        model: any torch model.
        batches: of its inputs, as :func:`fastrec.quantize_` takes them.
        evaluate: model -> quality, the higher the better; None = only answers are compared.
        keep: share of the quality, or of the answers (see :meth:`kept_by`), that has to be kept.

    Attributes:
        quality: the model's; None without ``evaluate``.

    Raises:
        ArgumentError: a quality that is not a finite number.
        DtypeError: a model without float scores.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], evaluate: Evaluate | None, keep: float
    ) -> None:
        self._batches, self._evaluate, self._keep = batches, evaluate, keep
        self._scores = self._scores_of(model)
        self.quality = self.quality_of(model)

    def quality_of(self, model: nn.Module) -> float | None:
        """A model's quality, by ``evaluate``."""
        if self._evaluate is None:
            return None
        with evaluating(model):
            value = float(self._evaluate(model))
        if not math.isfinite(value):
            raise ArgumentError("evaluate", "a finite quality", value)
        return value

    def kept_by(self, other: nn.Module | Engine) -> float:
        """Share of the best answers' lead that the other's best have, in the worst of all results.

        The best are k = m / 5 (from 1 to 10) of m scores; their lead is their mean score less that
        of all m, by this model's own scores. One answer for another that is nearly as good costs
        little; answers by chance keep 0.
        """
        return min(map(_kept, self._scores, self._scores_of(other)))

    def loss(self, model: nn.Module) -> float:
        """The cost of another model's differences, to rank layers by: quality lost, or the error
        over the scores' spread (both root mean square) in the worst of all results."""
        if self.quality is not None:
            quality = self.quality_of(model)
            assert quality is not None
            return self.quality - quality
        return max(
            correctness_gate(reference, found, Tolerance()).noise
            for reference, found in zip(self._scores, self._scores_of(model), strict=True)
        )

    def lost(self, model: nn.Module) -> str | None:
        """None where another model keeps enough, else how much it keeps."""
        if self.quality is not None:
            loss = self.loss(model)
            if loss <= (1 - self._keep) * abs(self.quality):
                return None
            return f"quality {self.quality - loss:.4g} after {self.quality:.4g}"
        kept = self.kept_by(model)
        return None if kept >= self._keep else f"{kept:.1%} of the answers kept"

    def _scores_of(self, model: nn.Module | Engine) -> list[np.ndarray]:
        """The float results as lists of scores [rows, m], float64."""
        call = call_model if isinstance(model, nn.Module) else _call
        parts = []
        with evaluating(model):
            for batch in self._batches:
                leaves = map(_array, tree_flatten(call(model, batch))[0])
                parts.append([a for a in leaves if a is not None and a.ndim])
        found = []
        for leaves in zip(*parts, strict=True):
            if leaves[0].ndim == 1 or leaves[0].shape[-1] == 1:
                # One score for each row: the rows are candidates of one list.
                found.append(np.concatenate([a.reshape(-1) for a in leaves])[None])
            else:
                found += [a.reshape(-1, a.shape[-1]) for a in leaves]
        if not found:
            raise DtypeError("model", "a model that gives float scores", "none")
        return found


def _call(engine: Any, batch: Any) -> Any:
    if hasattr(batch, "inputs"):
        batch = batch.inputs()
    if isinstance(batch, Mapping):
        return engine(**batch)
    return engine(*batch) if isinstance(batch, tuple | list) else engine(batch)


def _array(leaf: Any) -> np.ndarray | None:
    """Float scores in float64; None for other results."""
    if isinstance(leaf, torch.Tensor):
        return leaf.double().numpy(force=True) if leaf.is_floating_point() else None
    return (
        leaf.astype(np.float64) if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f" else None
    )


def _kept(reference: np.ndarray, found: np.ndarray) -> float:
    k = min(max(reference.shape[-1] // 5, 1), MOST)

    def mean_of_best(scores: np.ndarray) -> float:
        """By the reference's scores, of those that ``scores`` puts first."""
        best = np.argpartition(-scores, k - 1, -1)[:, :k]
        return float(np.take_along_axis(reference, best, -1).mean())

    lead = mean_of_best(reference) - float(reference.mean())
    return 1.0 if lead <= 0 else 1 - (mean_of_best(reference) - mean_of_best(found)) / lead

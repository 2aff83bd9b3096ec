"""The paper's cost model tau = alpha m L h^2 + beta, fitted to what was measured, and a better one.

Both are least squares of relative errors with coefficients that are not negative.

| form | tau in microseconds |
|---|---|
| the paper's | alpha m L h^2 + beta: m L h^2 are the multiply-adds of the dense layers |
| with precision | sum over kernels of alpha_k macs_k + gamma bytes + beta: the multiply-adds done, by the kernel that does them, and the bytes of weights read |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastrec.search.costs import Variant

PAPER, PRECISE = "alpha m L h^2 + beta", "sum of alpha_k macs_k + gamma bytes + beta"
GOOD = 0.2  # a fit whose typical relative error is above it is called bad


@dataclass(frozen=True)
class Fit:
    """One form fitted to one set of measurements.

    Attributes:
        form: as in the module's table.
        coefficients: microseconds per 10^6 multiply-adds or bytes; "beta" in microseconds.
        r2: share of the variance explained.
        relative_error: the median of |predicted - measured| / measured; ``worst`` is the largest.
        measured_us, predicted_us: point by point, whose difference are the residuals.
    """

    form: str
    coefficients: dict[str, float]
    r2: float
    relative_error: float
    worst: float
    measured_us: list[float] = field(repr=False)
    predicted_us: list[float] = field(repr=False)

    @property
    def residuals_us(self) -> list[float]:
        """measured - predicted."""
        pairs = zip(self.measured_us, self.predicted_us, strict=True)
        return [measured - predicted for measured, predicted in pairs]


@dataclass(frozen=True)
class CostModel:
    """Both forms, fitted to single layers and to whole models.

    Attributes:
        layers: fits to every linear layer's step in every variant.
        models: fits to whole calls of the variants; empty where there are too few.
        verdict: in words, whether the paper's form will do.
    """

    layers: dict[str, Fit]
    models: dict[str, Fit]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)


def fit_costs(variants: Sequence[Variant]) -> CostModel | None:
    """Both forms on the variants' layers and whole calls; None where there are too few layers."""
    rows = [(_terms([step]), step["us"]) for v in variants for step in v.steps if _linear(step)]
    if len(rows) < 8:
        return None
    layers = _both(rows)
    calls = [(_terms([s for s in v.steps if _linear(s)]), v.call_us) for v in variants if v.call_us]
    models = _both(calls) if len(calls) >= 6 else {}
    return CostModel(layers, models, _verdict(layers))


def _both(rows: Sequence[tuple[dict[str, float], float]]) -> dict[str, Fit]:
    kernels = sorted({name for terms, _ in rows for name in terms if name not in _SHARED})
    paper = {"alpha": "dense"}
    precise = {f"alpha {name}": name for name in kernels} | {"gamma": "bytes"}
    return {"paper": _fit(PAPER, paper, rows), "precise": _fit(PRECISE, precise, rows)}


_SHARED = ("dense", "bytes")


def _linear(step: Mapping[str, Any]) -> bool:
    return step["density"] is not None


def _terms(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Millions of multiply-adds and bytes, by name."""
    terms = {"dense": 0.0, "bytes": 0.0}
    for step in steps:
        done = step["macs"] / 1e6
        # The profile counts the groups that are kept, the paper's form all of them.
        terms["dense"] += done / step["density"] if step["density"] else 0.0
        terms["bytes"] += step["bytes"] / 1e6
        terms[step["op"]] = terms.get(step["op"], 0.0) + done
    return terms


def _fit(
    form: str, columns: Mapping[str, str], rows: Sequence[tuple[Mapping[str, float], float]]
) -> Fit:
    measured = np.array([us for _, us in rows])
    design = np.array([[*(terms.get(c, 0.0) for c in columns.values()), 1.0] for terms, _ in rows])
    weights = 1 / np.maximum(measured, 0.1)
    solution = non_negative(design * weights[:, None], measured * weights)
    predicted = design @ solution
    error = np.abs(predicted - measured) * weights
    spread = float(np.square(measured - measured.mean()).sum())
    return Fit(
        form,
        dict(zip([*columns, "beta"], map(float, solution), strict=True)),
        1 - float(np.square(measured - predicted).sum()) / spread if spread else 0.0,
        float(np.median(error)),
        float(error.max()),
        measured.tolist(),
        predicted.tolist(),
    )


def non_negative(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0: the best over all sets of columns, of which there are
    few."""
    columns = design.shape[1]
    best, least = np.zeros(columns), float(np.square(target).sum())
    for used in range(1, 1 << columns):
        chosen = [c for c in range(columns) if used >> c & 1]
        values = np.linalg.lstsq(design[:, chosen], target, rcond=None)[0]
        if (values < 0).any():
            continue
        rest = float(np.square(design[:, chosen] @ values - target).sum())
        if rest < least:
            least, best = rest, np.zeros(columns)
            best[chosen] = values
    return best


def _verdict(layers: Mapping[str, Fit]) -> str:
    paper, precise = layers["paper"], layers["precise"]
    if paper.relative_error <= GOOD:
        return f"{PAPER} fits: typical error {paper.relative_error:.0%} a layer"
    return (
        f"{PAPER} fits badly: typical error {paper.relative_error:.0%} a layer, up to "
        f"{paper.worst:.0%}. It knows neither precision nor sparsity. {PRECISE}: "
        f"{precise.relative_error:.0%}, up to {precise.worst:.0%}"
    )

"""Engines against torch, on random models."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from graphs import Model
from growing import grown
from torch import Tensor, nn

import fastrec
from fastrec.errors import FastrecError
from fastrec.measure.timing import Agreement
from fastrec.runtime import compiler

EPS = 2.0**-23
DRAWS = 6
# Casts of floats to integers too narrow for them: C++ leaves the result open.
_CAST = re.compile(r"\.(int|long|short)\(\)$")
_SUMS = re.compile("fft|cdist")
_LIMITS = {"int": 2.0**31, "long": 2.0**63, "short": 2.0**15}


def _noisy(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value * (1 + 4 * EPS * torch.randn_like(value))


@torch.no_grad()
def evaluated(
    model: Model, owner: nn.Module, inputs: tuple[Tensor, ...], *, noise: bool = False
) -> dict[str, Tensor]:
    """Each value of the model; with ``noise``, as another implementation could round it."""
    held: dict[str, Any] = dict(zip([i.name for i in model.inputs], inputs, strict=True))
    space = {"self": owner, "nn": nn, "torch": torch, "F": F}
    for statement in model.statements:
        given = {name: held[name] for name in statement.uses}
        if noise and not statement.exact:
            given = {name: _noisy(value) for name, value in given.items()}
        value = eval(statement.expression, {**space, **given})
        if noise and not statement.exact and value.is_floating_point():
            # Some functions cancel: an error of what they read, or of all that they sum.
            scale = value.abs()
            if value.numel() and _SUMS.search(statement.expression):
                scale = scale.clamp(min=float(scale.nan_to_num(0, 0).max()))
            for used in given.values():
                if used.shape == value.shape and used.is_floating_point():
                    scale = torch.maximum(scale, used.abs().clamp(max=1.0))
            value = value + 4 * EPS * scale * torch.randn_like(value)
            # What cancels to a rounding error may as well be 0.
            dropped = (value.abs() < 16 * EPS * scale) & (torch.rand(()) < 0.5)
            value = torch.where(dropped, 0.0, value)
        cast = _CAST.search(statement.expression)
        if noise and cast and given[statement.uses[0]].is_floating_point():
            source = given[statement.uses[0]]
            wide = ~(source.abs() < _LIMITS[cast[1]])
            value = torch.where(wide, torch.randint_like(value, 100), value)
        held[statement.name] = value
    return held


@dataclass
class Reference:
    """torch's results, and how far an engine may be from them."""

    values: dict[str, Tensor]
    tolerance: dict[str, Tensor]


def reference(model: Model, inputs: tuple[Tensor, ...]) -> Reference:
    """torch's values in float32, and a tolerance for each element.

    An element's tolerance is 8 times the most that roundings of 4 units of float32 at each inexact
    statement move it in a few draws, 4 times torch's own distance from float64, and a few units of
    the element and of its tensor. Where a draw gives another integer, NaN or infinity, the value
    is a matter of rounding, and nothing is asked of it.
    """
    owner = model.module()
    values = evaluated(model, owner, inputs)
    draws = [evaluated(model, owner, inputs, noise=True) for _ in range(DRAWS)]
    exact_owner = model.module().double()
    exact_owner.real = torch.float64
    doubles = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    exact = evaluated(model, exact_owner, doubles)
    tolerance = {}
    for name in {n for names in model.results.values() for n in names}:
        own = values[name].double()
        finite = own.isfinite()
        found = torch.zeros_like(own)
        for other in (*draws, exact):
            theirs = other[name].double()
            factor = 4 if other is exact else 8
            away = factor * (theirs - own).abs()
            same = (theirs == own) | (theirs.isnan() & own.isnan())
            away = torch.where(same, 0.0, torch.where(away.isnan(), torch.inf, away))
            found = torch.maximum(found, away)
        if values[name].is_floating_point():
            largest = own[finite].abs().max() if finite.any() else torch.tensor(0.0)
            found = found + EPS * (8 * torch.where(finite, own.abs(), 0.0) + 2 * largest) + 1e-36
        else:
            found = torch.where(found > 0, torch.inf, 0.0)
        tolerance[name] = found
    return Reference(values, tolerance)


def difference(name: str, ours: Any, wanted: Reference) -> str | None:
    """The fault of one result, or None."""
    right, most = wanted.values[name], wanted.tolerance[name]
    if not isinstance(ours, Tensor) or ours.dtype != right.dtype or ours.shape != right.shape:
        kind = f"{ours.dtype} {list(ours.shape)}" if isinstance(ours, Tensor) else type(ours)
        return f"{kind} for {right.dtype} {list(right.shape)}"
    a, b = ours.double(), right.double()
    away = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    away = torch.where(same, 0.0, torch.where(away.isnan(), torch.inf, away))
    bad = (away > most) & most.isfinite()
    if not bad.any():
        return None
    at = bad.nonzero()[0].tolist()
    place = tuple(at)
    return (
        f"{int(bad.sum())} of {bad.numel()} elements, at {at}: {a[place].item()!r} for "
        f"{b[place].item()!r}, tolerance {most[place].item():.3g}"
    )


@dataclass
class Tally:
    """Counts of graphs that were right, refused or wrong."""

    graphs: int = 0
    right: int = 0
    fixed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.graphs} graphs: {self.right} right ({self.fixed} for one batch only), "
            f"{sum(self.refused.values())} refused, {len(self.failures)} failed"
        )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without warnings, without compile's own check, whose tolerance knows nothing of a graph's
    roundings, and without torch's fast path of encoder layers: NaN for what its slow path gives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    passed = Agreement(0.0, 0.0, 0.0, 1.0, None)
    try:
        with warnings.catch_warnings(), mock.patch.object(compiler, "correctness_gate") as gate:
            warnings.simplefilter("ignore")
            gate.return_value = passed
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def attempt(model: Model, backend: str) -> tuple[str, str]:
    """``right``, ``fixed`` (right, but for the examples' batch alone), ``refused`` or ``failed``,
    and why."""
    first, other = model.batches
    examples = model.request(first, model.seed)
    options: dict[str, Any] = {"fallback": "error"} if backend == "native" else {}
    outcome = why = ""
    try:
        with _alone():
            engine = fastrec.compile(model.module(), examples, backend, 1, **options)
    except FastrecError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc(limit=-6)
    for place, batch in enumerate((first, other, first)):
        inputs = model.request(batch, model.seed + place)
        with _alone():
            try:
                wanted = reference(model, inputs)
            except (RuntimeError, IndexError):
                continue  # torch takes no such values
        try:
            found = engine(*inputs)
        except fastrec.errors.ShapeError as error:
            if batch == first:
                return "failed", f"B={batch}: {error}"
            outcome = "fixed"
            why = " ".join(str(row["why"]) for row in engine.describe() if row.get("why"))
            continue
        except Exception:
            return "failed", f"B={batch}: {traceback.format_exc(limit=-6)}"
        for graph, names in model.results.items():
            for name, ours in zip(names, found[graph], strict=True):
                text = difference(name, ours, wanted)
                if text is not None:
                    return "failed", f"{graph}.{name} at B={batch}, request {place}: {text}"
    return outcome or "right", why


def _smallest(model: Model, backend: str) -> tuple[Model, str]:
    """The first of the graph's values that fails alone, else the graph as it is."""
    for statement in model.statements:
        single = model.only({"g": [statement.name]})
        try:
            outcome, why = attempt(single, backend)
        except Exception:
            continue
        if outcome == "failed":
            return single, why
    return model, attempt(model, backend)[1]


def check(model: Model, backend: str, tally: Tally) -> None:
    """Try a model of several graphs. Those that a refusal names are counted, and the others tried
    again; where something fails, each graph is tried alone."""
    tally.graphs += len(model.results)
    left = dict(model.results)
    while left:
        pack = model.only(left)
        outcome, why = attempt(pack, backend)
        named = pack.named(why)
        if outcome == "right":
            tally.right += len(left)
            return
        if outcome == "failed" or not named:
            break
        for graph in named:
            del left[graph]
        if outcome == "fixed":
            tally.right += len(named)
            tally.fixed += len(named)
        else:
            for reason in re.split(r"; (?=native:)", why):
                tally.refused[_kind(reason)] += 1
    for graph, names in left.items():
        own = model.only({graph: names})
        outcome, why = attempt(own, backend)
        if outcome in ("right", "fixed"):
            tally.right += 1
            tally.fixed += outcome == "fixed"
        elif outcome == "refused":
            tally.refused[_kind(why)] += 1
        else:
            small, why = _smallest(own, backend)
            tally.failures.append(
                f"# {backend}, seed {model.seed}, {graph}: {why}\n{small.script()}"
            )


def _kind(why: str) -> str:
    return re.sub(r" in \S+( \(\S+\))?:|\d+|'[^']*'", "_", why)[:160]


def run(
    backend: str, seed: int, *, models: int | None = None, seconds: float = 1e9, graphs: int = 6
) -> Tally:
    """Try models of consecutive seeds; what fails is written to stderr at once."""
    tally, begun, last = Tally(), time.monotonic(), 0.0
    torch.set_num_threads(1)
    number = 0
    while (models is None or number < models) and time.monotonic() - begun < seconds:
        before = len(tally.failures)
        with _alone():
            model = grown(seed + number, graphs)
        if model.results:
            check(model, backend, tally)
        number += 1
        for text in tally.failures[before:]:
            sys.stderr.write(f"\n{text}\n")
        if time.monotonic() - last > 60:
            last = time.monotonic()
            sys.stderr.write(f"[{backend}] seeds {seed}..{seed + number - 1}: {tally}\n")
    return tally

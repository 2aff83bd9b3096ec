"""``autotune``: for each layer the choice that costs least quality under a budget."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastrec.compress.artifact import load, save
from fastrec.compress.layer_sensitivity import sensitivity
from fastrec.compress.patterns import BlockPruning
from fastrec.compress.quantization import Int8
from fastrec.compress.selection import check_count, check_model
from fastrec.errors import ArgumentError, ArtifactError, BackendError, BudgetError, DtypeError
from fastrec.exporters.model_spec import as_tensors, spec_of
from fastrec.measure.machine import usable_cpus
from fastrec.models import MODELS
from fastrec.search.budget import Budget
from fastrec.search.costs import (
    CostTable,
    Measured,
    Setting,
    Variant,
    carried_out,
    measure,
    measure_variant,
    variants_of,
)
from fastrec.search.fit import fit_costs
from fastrec.search.front import Candidate, pick, sweep
from fastrec.search.journal import Journal, fingerprint
from fastrec.search.result import AutotuneResult, Point
from fastrec.search.space import Choice, Chosen, Space, pruned_, quantised_, restructured
from fastrec.train.evaluation import evaluating

Evaluate = Callable[[nn.Module], float]
FineTune = Callable[[nn.Module, int], Any]
Progress = Callable[[str, int, int], None]
CANDIDATES = 50  # of the requests that a ranker is timed on


def autotune(
    model: nn.Module,
    budget: Budget,
    *,
    evaluate: Evaluate,
    calibration: Iterable[Any],
    finetune: FineTune | None = None,
    space: Space | None = None,
    inputs: Sequence[Any] | None = None,
    int8: Int8 | None = None,
    trials: int = 8,
    rounds: int = 3,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> AutotuneResult:
    """Search windows, offsets, groups, ranks, sparsities and precisions, layer by layer, for the
    best quality that a budget allows.

    1. Cost: every choice of every layer is timed in whole compiled plans, and its bytes counted.
    2. Quality: each choice of each layer alone, without fine-tuning (:func:`sensitivity` for
       pruning and INT8).
    3. For every exchange rate between the two, each layer takes what is best for it: the sweep
       gives the front of predicted cost and quality.
    4. ``trials`` points of the front, most of them just within the budget, are made, compiled and
       timed; then successive halving: all are fine-tuned and evaluated once, the better half of
       those within the budget once more, and so on.

    Args:
        model: any trained torch model; left as it is.
        budget: see :class:`Budget`.
        evaluate: model -> quality, the higher the better (a metric such as NDCG). Called in eval
            mode, without gradients, once a layer and choice and once a trial and round.
        calibration: batches for INT8's ranges, see :func:`fastrec.quantize_`. The first is what
            the model is timed on, brought to ``budget.batch`` rows; a ``Ranker`` or ``SASRec`` is
            timed on full histories (and 50 candidates).
        finetune: called as finetune(model, round) with round 1, 2, ...; pruned weights stay zero
            meanwhile. Without it there is one round.
        space: what is searched; see :class:`Space`.
        inputs: the inputs of one call to time on, in place of the above.
        int8: how ranges are calibrated.
        trials: points that are made and measured, besides the model as it is.
        rounds: of fine-tuning at most.
        out: folder for ``journal.json`` and the trials' weights. A second call with the same model,
            space, batch and threads goes on from there, with other limits too. (``evaluate`` and
            ``finetune`` are the caller's: where they change, take another folder.)
        progress: called with (stage, steps done, steps in all).

    Raises:
        BudgetError: no choice keeps within the budget; ``nearest`` has what can be reached.
        ArgumentError, DtypeError: a bad argument, no layer with a choice, or a quality that is not
            a finite number.
        BackendError: the native engine has no plan for the model; names what is lacking.
    """
    check_model(model)
    if not isinstance(budget, Budget):
        raise DtypeError("budget", "a fastrec.Budget", type(budget).__name__)
    if not callable(evaluate):
        raise DtypeError("evaluate", "a callable model -> quality", type(evaluate).__name__)
    if finetune is not None and not callable(finetune):
        raise DtypeError("finetune", "a callable (model, round)", type(finetune).__name__)
    if space is not None and not isinstance(space, Space):
        raise DtypeError("space", "a fastrec.search.Space", type(space).__name__)
    check_count("trials", trials)
    check_count("rounds", rounds)
    batches = list(calibration)
    if not batches:
        raise ArgumentError("calibration", "at least one batch", "none")
    arrays = _inputs(model, batches[0], inputs, budget.batch)
    setting = Setting(arrays, budget.threads or usable_cpus(), batches, int8 or Int8())
    return _Search(
        model, budget, evaluate, finetune, space or Space(), setting, trials,
        rounds if finetune is not None else 1, None if out is None else Path(out), progress,
    ).run()  # fmt: skip


class _Search:
    """One call of :func:`autotune`."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        evaluate: Evaluate,
        finetune: FineTune | None,
        space: Space,
        setting: Setting,
        trials: int,
        rounds: int,
        out: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.budget, self.evaluate, self.finetune = model, budget, evaluate, finetune
        self.setting, self.trials, self.rounds, self.out = setting, trials, rounds, out
        self.progress = progress
        self.units, self.left = space.units(model)
        shapes = [(list(a.shape), str(a.dtype)) for a in setting.inputs]
        int8 = dataclasses.asdict(setting.int8)
        key = fingerprint(model, space.to_dict(), setting.threads, shapes, int8)
        self.journal = Journal(out, key)
        self.memory: dict[str, nn.Module] = {}

    def run(self) -> AutotuneResult:
        as_it_is = {unit.name: unit.choices[0] for unit in self.units}
        base = Measured(**self.journal.item("base", lambda: self._measured(as_it_is)))
        self._without_patterns_that_do_not_compile()
        table = self._costs(base)
        self._require_reachable(table)
        quality = self._quality("quality of the model as it is", self.model)
        losses = self._losses(quality)
        front = sweep(self.units, table, losses, self.budget)
        if self.finetune is None:  # the model as it is has its point already
            front = [c for c in front if c.chosen != as_it_is] or front
        timed = self._timed(front)
        points = [self._point(Candidate(as_it_is, base, 0.0), base, quality, 0)]
        points += self._halving(timed)
        within = [p for p in points if p.within]
        best = max(within, key=lambda p: p.quality)
        if best.round == 0:
            final = copy.deepcopy(self.model).eval()
        else:
            chosen = next(c for c, _ in timed if c.key == best.key)
            final = self._stored(chosen, f"served {best.round}")
        again = measure(final, self.setting)
        return AutotuneResult(
            final,
            dataclasses.replace(best, latency_again_ms=again.latency_ms),
            points,
            self.budget,
            {u.name: {c.name: losses[u.name, c.name] for c in u.choices} for u in self.units},
            {
                u.name: {c.name: dict(zip(("us", "bytes"), table.cost(u, c), strict=True))
                         for c in u.choices}
                for u in self.units
            },
            fit_costs(table.variants),
            self.left,
            self.journal.reused,
        )  # fmt: skip

    # Cost

    def _without_patterns_that_do_not_compile(self) -> None:
        """Attention whose masks a pattern cannot take in a plan keeps what it has."""
        attention = [unit for unit in self.units if unit.kind == "attention"]
        if not attention:
            return

        def make() -> str | None:
            try:
                self._measured({unit.name: unit.choices[1] for unit in attention})
            except BackendError as error:
                return str(error)
            return None

        reason = self.journal.item("patterns compile", make)
        if reason is not None:
            self.units = [unit for unit in self.units if unit.kind != "attention"]
            self.left |= {unit.name: f"with a pattern, {reason}" for unit in attention}
            if not self.units:
                raise ArgumentError("model", "layers that have a choice", reason)

    def _costs(self, base: Measured) -> CostTable:
        chosen = variants_of(self.units)
        variants = []
        for number, choices in enumerate(chosen):
            self._tell("cost of each layer's choices", number, len(chosen))

            def make(choices: Chosen = choices) -> Any:
                variant = measure_variant(self.model, self.units, choices, self.setting)
                return dataclasses.asdict(variant)

            variants.append(Variant(**self.journal.item(f"cost {number}", make)))
        self._tell("cost of each layer's choices", len(chosen), len(chosen))
        return CostTable(self.units, variants, base)

    def _require_reachable(self, table: CostTable) -> None:
        """BudgetError where not even the cheapest choices keep within the budget: measured."""
        nearest = {}
        for name, limit in self.budget.limits.items():
            index = ("latency_ms", "size_mb").index(name)
            cheapest = {
                unit.name: min(unit.choices, key=lambda c: table.cost(unit, c)[index])
                for unit in self.units
            }
            if getattr(table.predict(cheapest), name) > 0.9 * limit:
                item = f"cheapest {name}"
                found = self.journal.item(item, lambda: self._measured(cheapest))  # noqa: B023
                nearest[name] = found[name]
        self._refuse({n: value for n, value in nearest.items() if value > self.budget.limits[n]})

    def _refuse(self, nearest: dict[str, float]) -> None:
        if nearest:
            units = {"latency_ms": "ms", "size_mb": "MB"}
            reached = " and ".join(f"at least {v:.3g} {units[n]}" for n, v in nearest.items())
            asked = " and ".join(f"{self.budget.limits[n]:g} {units[n]}" for n in nearest)
            raise BudgetError(f"{reached}, the nearest that the space reaches", asked, nearest)

    def _measured(self, chosen: Chosen) -> dict[str, float]:
        made = carried_out(self.model, chosen, self.setting)
        return dataclasses.asdict(measure(made, self.setting))

    # Quality

    def _quality(self, item: str, model: nn.Module) -> float:
        def make() -> float:
            with evaluating(model):
                value = float(self.evaluate(model))
            if not math.isfinite(value):
                raise ArgumentError("evaluate", "a finite quality", f"{value} for {item}")
            return value

        return float(self.journal.item(item, make))

    def _losses(self, quality: float) -> dict[tuple[str, str], float]:
        """(layer, choice) -> quality lost where that layer alone has it: the sum of what its
        structure, its pruning and its rounding lose; never below 0."""
        choices = [(u, c) for u in self.units for c in u.choices]
        shares = sorted({c.sparsity for u, c in choices if c.sparsity})
        alone = [u.name for u in self.units if u.kind != "attention"]
        pruned = {share: self._sensitivities(f"pruned {share:g}", alone, share) for share in shares}
        rounded: dict[str, float] = {}
        if any(c.precision == "int8" for _, c in choices):
            rounded = self._sensitivities("quantized", alone, None)
        structures = list(dict.fromkeys(
            (u.name, c if u.kind == "attention" else c.structure)
            for u, c in choices
            if c.structure != Choice()
        ))  # fmt: skip
        lost: dict[tuple[str, Choice], float] = {}
        for number, (name, choice) in enumerate(structures):
            self._tell("quality of each layer's choices", number, len(structures))
            item = f"quality {name}: {choice.name}"
            if item not in self.journal.items:
                made = carried_out(self.model, {name: choice}, self.setting)
                self._quality(item, made)
            lost[name, choice] = quality - self.journal.items[item]
        if structures:
            self._tell("quality of each layer's choices", len(structures), len(structures))
        found: dict[tuple[str, str], float] = {}
        for unit, choice in choices:
            if unit.kind == "attention":
                total = lost.get((unit.name, choice), 0.0)
            else:
                total = lost.get((unit.name, choice.structure), 0.0)
                if choice.sparsity:
                    total += pruned[choice.sparsity].get(unit.name, math.inf)
                if choice.precision == "int8":
                    # Never called: it cannot be quantised.
                    total += rounded.get(unit.name, math.inf)
            found[unit.name, choice.name] = max(0.0, total)
        return found

    def _sensitivities(self, item: str, names: list[str], share: float | None) -> dict[str, float]:
        """Layer -> rise of -quality when it alone is pruned to ``share``, or quantised."""

        def tell(layer: str, done: int, total: int) -> None:
            self._tell(f"sensitivity, {item}", done, total)

        def make() -> dict[str, float]:
            report = sensitivity(
                self.model,
                lambda model: -float(self.evaluate(model)),
                prune=None if share is None else BlockPruning(share),
                quantize=self.setting.int8 if share is None else None,
                calibration=self.setting.calibration if share is None else None,
                filter_fn=lambda module, name: name in names,
                progress=tell,
            )
            rises = {n: la.quantized if share is None else la.pruned
                     for n, la in report.layers.items()}  # fmt: skip
            return {name: rise for name, rise in rises.items() if rise is not None}

        found: dict[str, float] = self.journal.item(f"sensitivity, {item}", make)
        return found

    # Trials

    def _timed(self, front: Sequence[Candidate]) -> list[tuple[Candidate, Measured]]:
        """The trials, measured end to end; again, with predictions set right by what was measured,
        while none keeps within the budget."""
        timed: dict[str, tuple[Candidate, Measured]] = {}
        factor = 1.0
        for _ in range(4):
            for number, candidate in enumerate(pick(front, self.budget, self.trials, factor)):
                self._tell("trials: cost end to end", number, self.trials)
                if candidate.key not in timed:
                    item = f"trial {candidate.key}"
                    cost = self.journal.item(item, lambda: self._measured(candidate.chosen))  # noqa: B023
                    timed[candidate.key] = candidate, Measured(**cost)
            if any(self.budget.use(cost) <= 1 for _, cost in timed.values()):
                break
            ratios = [self.budget.use(m) / self.budget.use(c.cost) for c, m in timed.values()]
            factor = max(1.05 * factor, float(np.median(ratios)))
        self._tell("trials: cost end to end", self.trials, self.trials)
        found = list(timed.values())
        if not any(self.budget.use(cost) <= 1 for _, cost in found):
            closest = min((cost for _, cost in found), key=self.budget.use)
            over = {n: getattr(closest, n) for n in self.budget.limits}
            self._refuse({n: v for n, v in over.items() if v > self.budget.limits[n]})
        return found

    def _halving(self, timed: Sequence[tuple[Candidate, Measured]]) -> list[Point]:
        points: dict[str, Point] = {}
        alive = list(timed)
        for round_ in range(1, self.rounds + 1):
            for number, (candidate, cost) in enumerate(alive):
                self._tell(f"trials: round {round_}", number, len(alive))
                item = f"trial {candidate.key}, round {round_}"
                if item not in self.journal.items or not self._finished(candidate, round_):
                    self.journal.items.pop(item, None)
                    self._quality(item, self._trained(candidate, round_))
                value = self.journal.items[item]
                before = points.get(candidate.key)
                if before is None or value >= before.quality:
                    points[candidate.key] = self._point(candidate, cost, value, round_)
            self._tell(f"trials: round {round_}", len(alive), len(alive))
            within = [pair for pair in alive if self.budget.use(pair[1]) <= 1]
            within.sort(key=lambda pair: -points[pair[0].key].quality)
            alive = within[: max(1, len(alive) // 2)]
        return list(points.values())

    def _trained(self, candidate: Candidate, round_: int) -> nn.Module:
        """The candidate after this round, as it is to be served; both its forms are kept."""
        if round_ == 1 or not self._finished(candidate, round_ - 1):
            made = restructured(self.model, candidate.chosen)
            first = 1
        else:
            made = copy.deepcopy(self._stored(candidate, f"float {round_ - 1}"))
            first = round_
        for current in range(first, round_ + 1):
            train = self.finetune
            pruned_(
                made,
                candidate.chosen,
                None if train is None else lambda m: train(m, current),  # noqa: B023
            )
        made.eval()
        if self.finetune is not None and round_ < self.rounds:
            self._store(candidate, f"float {round_}", copy.deepcopy(made))
        quantised_(made, candidate.chosen, self.setting.calibration, self.setting.int8)
        self._store(candidate, f"served {round_}", made)
        return made

    def _folder(self, candidate: Candidate, form: str) -> Path:
        assert self.out is not None
        return self.out / "trials" / candidate.key / form.replace(" ", "-")

    def _finished(self, candidate: Candidate, round_: int) -> bool:
        """Whether the weights after this round are still there."""
        try:
            self._stored(candidate, f"served {round_}")
            if self.finetune is not None and round_ < self.rounds:
                self._stored(candidate, f"float {round_}")
        except (KeyError, ArtifactError):
            return False
        return True

    def _store(self, candidate: Candidate, form: str, model: nn.Module) -> None:
        if self.out is None:
            self.memory[f"{candidate.key} {form}"] = model
        else:
            save(model, self._folder(candidate, form))

    def _stored(self, candidate: Candidate, form: str) -> nn.Module:
        if self.out is None:
            return self.memory[f"{candidate.key} {form}"]
        own = type(self.model) in {cls for cls, _ in MODELS.values()}
        return load(self._folder(candidate, form), None if own else copy.deepcopy(self.model))

    def _point(self, candidate: Candidate, cost: Measured, quality: float, round_: int) -> Point:
        return Point(
            candidate.key,
            {name: choice.name for name, choice in candidate.chosen.items()},
            quality,
            cost.latency_ms,
            candidate.cost.latency_ms,
            cost.size_mb,
            candidate.cost.size_mb,
            round_,
            self.budget.use(cost) <= 1,
        )

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def _inputs(
    model: nn.Module, batch: Any, given: Sequence[Any] | None, rows: int
) -> tuple[np.ndarray, ...]:
    """One call's inputs as arrays."""
    if given is not None:
        return tuple(t.numpy() for t in as_tensors("inputs", given))
    if hasattr(batch, "inputs") and callable(batch.inputs):
        batch = batch.inputs()
    if isinstance(batch, Mapping):
        raise ArgumentError("inputs", "one call's inputs, where batches are mappings", None)
    first = as_tensors("calibration", batch if isinstance(batch, tuple | list) else (batch,))
    spec = spec_of(model, first)
    if "L" in spec.limits:  # one of fastrec.models: full histories
        return spec.sample({"B": rows, "m": CANDIDATES}, full=True)
    take = np.arange(rows) % len(first[0])
    return tuple(t.numpy()[take] for t in first)

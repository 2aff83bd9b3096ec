"""``Recipe``: the whole compression schedule as one object, kept beside the weights it made."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrec.compress.artifact import MANIFEST, load, read_manifest, save
from fastrec.compress.distillation import (
    AttentionMapKL,
    HardLabel,
    HiddenStates,
    LogitKL,
    distillation_loss,
)
from fastrec.compress.pruning import MIN_TABLE_ROWS, BlockPruning, NMPruning, prune_
from fastrec.compress.quantization import QAT, Int8, quantize_
from fastrec.compress.replacement import Grouped, LowRank, Replacement, WindowSparse, replace_
from fastrec.compress.selection import check_count, check_fraction, check_model
from fastrec.compress.student_init import make_student
from fastrec.errors import ArgumentError, ArtifactError
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.models import Ranker
from fastrec.train import TrainConfig, fit
from fastrec.train.checkpoint import tensors_digest

VARIANTS = ("baseline", "quantized", "pruned", "pruned_quantized", "distilled")
"""The five rows of the paper's Table I."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FineTune:
    """A short training: ``steps`` batches at a peak rate of ``lr`` (0 steps = none)."""

    steps: int = 150
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_count("steps", self.steps, low=0)
        if not isinstance(self.lr, int | float) or not 0 < self.lr < 10:
            raise ArgumentError("lr", "a positive learning rate", repr(self.lr))


@dataclass(frozen=True)
class Distillation:
    """How the student is made and trained.

    Args:
        steps: batches; each runs the teacher forward too.
        lr: peak learning rate.
        share: of the teacher's parameters that the student may have (the paper's 20 %).
        temperature: of :class:`LogitKL`.
        logits: weight of :class:`LogitKL`.
        attention: weight of :class:`AttentionMapKL`; 0 leaves the maps unrecorded, which is
            quicker.
        labels: weight of :class:`HardLabel`.
        hidden: weight of :class:`HiddenStates`; 0 leaves the layers' outputs unrecorded.
        inherit: whether the student starts from the teacher's tables, projected.
    """

    steps: int = 600
    lr: float = 1e-3
    share: float = 0.2
    temperature: float = 2.0
    logits: float = 1.0
    attention: float = 0.5
    labels: float = 0.5
    inherit: bool = True
    hidden: float = 0.0

    def __post_init__(self) -> None:
        FineTune(self.steps, self.lr)
        HiddenStates(self.hidden)
        check_fraction("share", self.share, low=1e-6, high=1.000001)
        LogitKL(self.temperature, self.logits)
        AttentionMapKL(self.attention)
        HardLabel(self.labels)

    def losses(self) -> list[Any]:
        """The terms whose weight is not 0."""
        terms: list[Any] = [
            HardLabel(self.labels),
            LogitKL(self.temperature, self.logits),
            AttentionMapKL(self.attention),
            HiddenStates(self.hidden),
        ]
        return [term for term in terms if term.weight > 0]


@dataclass(frozen=True)
class Recipe:
    """Prune, fine-tune, quantise, train quantised, distil: everything from one trained baseline.

    Args:
        prune: pruning, in blocks or N:M; ``finetune`` runs after each of its rounds.
        quantize: ranges of the activations and what is quantised.
        qat: quantisation-aware training of the quantised variants; None or 0 steps = calibration
            only.
        distill: the student.
        finetune: the training after each pruning round.
        batch_size: examples a step.
        n_candidates: positive and negatives a training example.
        calibration_examples: training examples that set the activations' ranges.
        seed: of batches, negatives and the student's initial weights.
        replace: replacements for :func:`replace_`, applied first, each followed by ``finetune``;
            the quantised and pruned variants start from the result.
    """

    prune: BlockPruning | NMPruning = field(default_factory=BlockPruning)
    quantize: Int8 = field(default_factory=Int8)
    qat: FineTune | None = field(default_factory=lambda: FineTune(steps=100, lr=1e-4))
    distill: Distillation = field(default_factory=Distillation)
    finetune: FineTune = field(default_factory=FineTune)
    batch_size: int = 64
    n_candidates: int = 12
    calibration_examples: int = 512
    seed: int = 0
    replace: tuple[Replacement, ...] = ()

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[type, ...]] = {
            "prune": (BlockPruning, NMPruning),
            "quantize": (Int8,),
            "distill": (Distillation,),
            "finetune": (FineTune,),
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                expected = " or a ".join(k.__name__ for k in kind)
                raise ArgumentError(name, f"a {expected}", repr(getattr(self, name)))
        if not isinstance(self.replace, list | tuple):
            raise ArgumentError("replace", "a sequence of replacements", repr(self.replace))
        object.__setattr__(self, "replace", tuple(self.replace))
        for config in self.replace:
            if not isinstance(config, LowRank | Grouped | WindowSparse):
                raise ArgumentError("replace", "LowRank, Grouped or WindowSparse", repr(config))
        if self.qat is not None and not isinstance(self.qat, FineTune):
            raise ArgumentError("qat", "a FineTune or None", repr(self.qat))
        for name in ("batch_size", "calibration_examples"):
            check_count(name, getattr(self, name))
        check_count("n_candidates", self.n_candidates, low=2)
        check_count("seed", self.seed, low=0)

    @classmethod
    def quick(cls, seed: int = 0) -> Recipe:
        """Few steps, for small data: all five variants of a 6 M parameter ranker in about a minute
        and a half on two cores (the ``demo`` preset)."""
        return cls(
            qat=FineTune(steps=30, lr=1e-4),
            finetune=FineTune(steps=40),
            distill=Distillation(steps=200, lr=2e-3),
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reverses it."""
        values = dataclasses.asdict(self)
        if isinstance(self.prune, NMPruning):
            values["prune"]["type"] = "NMPruning"
        values["replace"] = [{"type": type(c).__name__, **dataclasses.asdict(c)}
                             for c in self.replace]  # fmt: skip
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Reverse of :meth:`to_dict`; what is absent takes its default.

        Raises:
            ArgumentError: an unknown key or a bad value.
        """
        parts = {
            "quantize": Int8,
            "qat": FineTune,
            "distill": Distillation,
            "finetune": FineTune,
        }
        arguments = dict(_known("recipe", cls, values))
        for name, kind in parts.items():
            if arguments.get(name) is not None:
                arguments[name] = kind(**_known(name, kind, arguments[name]))
        if "prune" in arguments:
            arguments["prune"] = _typed("prune", (BlockPruning, NMPruning), arguments["prune"])
        kinds = (LowRank, Grouped, WindowSparse)
        arguments["replace"] = [
            _typed("replace", kinds, part) for part in arguments.get("replace", ())
        ]
        return cls(**arguments)

    def run(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        out: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        variants: Sequence[str] = VARIANTS,
    ) -> dict[str, nn.Module]:
        """The variants of Table I from one trained baseline, which stays as it is.

        Args:
            model: the trained baseline; a :class:`~fastrec.models.Ranker`, or (without "distilled")
                any model that takes the ranker's six inputs.
            dataset: a :class:`fastrec.data.SequenceDataset`.
            out: folder; each variant is saved to ``out/<variant>`` when it is done. A variant that
                is there already, made from this very baseline, data and recipe, is loaded.
            progress: called with (variant and stage, steps done, steps in all).
            variants: which to make; "pruned_quantized" goes by way of "pruned".

        Returns:
            variant -> model in eval mode, in the order of the table. "distilled" is bfloat16.

        Raises:
            ArgumentError: an unknown variant, or a distilled one of a model without a student.
        """
        model = check_model(model)
        for name in variants:
            if name not in VARIANTS:
                raise ArgumentError("variants", f"names among {VARIANTS}", repr(name))
        if "distilled" in variants and not isinstance(model, Ranker):
            raise ArgumentError(
                "variants",
                "no 'distilled' for a model other than fastrec.models.Ranker: use fastrec.distill",
                type(model).__name__,
            )
        return _Run(self, model, dataset, out, progress).all(variants)


class _Run:
    """One call of :meth:`Recipe.run`."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        dataset: Any,
        out: str | os.PathLike[str] | None,
        progress: Progress | None,
    ) -> None:
        self.recipe, self.dataset, self.progress = recipe, dataset, progress
        self.baseline = copy.deepcopy(model).eval()
        self.out = None if out is None else Path(out)
        self.key = _key(recipe, self.baseline, dataset)
        self.done: dict[str, nn.Module] = {}

    def all(self, variants: Sequence[str]) -> dict[str, nn.Module]:
        for name in VARIANTS:
            if name in variants:
                self.get(name)
        return {name: self.done[name] for name in VARIANTS if name in variants}

    def get(self, name: str) -> nn.Module:
        if name not in self.done:
            model = self._finished(name)
            if model is None:
                self._tell(name, 0, 1)
                model, info = getattr(self, f"_{name}")()
                model.eval()
                if self.out is not None:
                    info |= {"variant": name, "key": self.key}
                    save(model, self.out / name, recipe=self.recipe, info=info)
            self._tell(name, 1, 1)
            self.done[name] = model
        return self.done[name]

    def _finished(self, name: str) -> nn.Module | None:
        if self.out is None or not (self.out / name / MANIFEST).exists():
            return None
        try:
            if read_manifest(self.out / name)["info"].get("key") != self.key:
                return None
            own_class = isinstance(self.baseline, Ranker)
            return load(self.out / name, None if own_class else copy.deepcopy(self.baseline))
        except ArtifactError:
            return None  # damaged by an interruption or from another version: made again

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _baseline(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.baseline, {}

    def _start(self) -> nn.Module:
        """A copy of the model that the quantised and pruned variants start from."""
        return copy.deepcopy(self.get("replaced") if self.recipe.replace else self.baseline)

    def _replaced(self) -> tuple[nn.Module, dict[str, Any]]:
        model, reports = copy.deepcopy(self.baseline), []
        for number, config in enumerate(self.recipe.replace, 1):
            reports.append(replace_(model, config).to_dict())
            stage = f"replaced: {type(config).__name__}"
            self._train(model, self.recipe.finetune, stage, 50 + number)
        return model, {"replace": reports}

    def _quantized(self) -> tuple[nn.Module, dict[str, Any]]:
        return self._quantise("quantized", self._start(), 1)

    def _pruned(self) -> tuple[nn.Module, dict[str, Any]]:
        model, recipe = self._start(), self.recipe

        def finetune(module: nn.Module, round_: int) -> None:
            stage = f"pruned: round {round_} of {recipe.prune.rounds}"
            self._train(module, recipe.finetune, stage, 1 + round_)

        report = prune_(model, recipe.prune, finetune=finetune, row_counts=self._row_counts(model))
        return model, {"prune": report.to_dict()}

    def _pruned_quantized(self) -> tuple[nn.Module, dict[str, Any]]:
        pruned = copy.deepcopy(self.get("pruned"))
        return self._quantise("pruned_quantized", pruned, 2 + self.recipe.prune.rounds)

    def _distilled(self) -> tuple[nn.Module, dict[str, Any]]:
        teacher, plan, seed = self.baseline, self.recipe.distill, self.recipe.seed
        assert isinstance(teacher, Ranker)
        config = teacher.config.student(plan.share)
        if plan.inherit:
            student = make_student(teacher, config, seed=seed)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                student = Ranker(config)
        loss_fn = distillation_loss(teacher, plan.losses())
        schedule = FineTune(plan.steps, plan.lr)
        self._train(student, schedule, "distilled", 3 + self.recipe.prune.rounds, loss_fn)
        return student.to(torch.bfloat16), {"student": config.to_dict()}

    def _quantise(
        self, name: str, model: nn.Module, offset: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        recipe, ranges = self.recipe, self.recipe.quantize
        if recipe.qat is None or recipe.qat.steps == 0:
            report = quantize_(model, ranges, calibration=self._calibration())
            return model, {"quantize": report.to_dict()}
        prepare = QAT.like(ranges, "prepare")
        quantize_(model, prepare, calibration=self._calibration())
        self._train(model, recipe.qat, f"{name}: QAT", offset)
        report = quantize_(model, QAT.like(ranges, "convert"))
        return model, {"quantize": report.to_dict()}

    def _calibration(self) -> Iterable[Any]:
        recipe = self.recipe
        batches: Iterable[Any] = self.dataset.batches(
            "train",
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            limit=recipe.calibration_examples,
            n_candidates=recipe.n_candidates,
        )
        return batches

    def _row_counts(self, model: nn.Module) -> dict[str, Any]:
        """Popularity of the items, if the model's item table is pruned."""
        table = getattr(model, "item_embedding", None)
        prunes = getattr(self.recipe.prune, "embedding_block", None) is not None
        if not isinstance(table, nn.Embedding) or not prunes:
            return {}
        counts = self.dataset.item_count
        fits = table.num_embeddings == len(counts) and len(counts) >= MIN_TABLE_ROWS
        return {"item_embedding": counts} if fits else {}

    def _train(
        self, model: nn.Module, plan: FineTune, stage: str, offset: int, loss_fn: Any = None
    ) -> None:
        """Train ``plan.steps`` steps; ``offset`` gives each stage its own seed."""
        if plan.steps == 0:
            return

        def on_step(step: int, loss: float) -> None:
            self._tell(stage, step, plan.steps)

        self._tell(stage, 0, plan.steps)
        config = TrainConfig(
            epochs=plan.steps,  # an upper bound: max_steps ends the run
            max_steps=plan.steps,
            batch_size=self.recipe.batch_size,
            n_candidates=self.recipe.n_candidates,
            lr=plan.lr,
            seed=self.recipe.seed * 1000 + 100 + offset,
            valid_users=0,
            patience=None,
        )
        fit(model, self.dataset, config, progress=False, loss_fn=loss_fn, on_step=on_step)


def _known(argument: str, kind: type, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ArgumentError(argument, f"the fields of {kind.__name__}", repr(values))
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - names):
        raise ArgumentError(argument, f"keys among {sorted(names)}", unknown)
    return values


def _typed(argument: str, kinds: Sequence[type], values: Any) -> Any:
    """An instance of the class that the key "type" names; without the key, of the first."""
    names = {kind.__name__: kind for kind in kinds}
    fields = dict(values) if isinstance(values, dict) else values
    kind = kinds[0]
    if isinstance(fields, dict) and "type" in fields:
        name = fields.pop("type")
        if name not in names:
            raise ArgumentError(argument, f"a type among {sorted(names)}", repr(name))
        kind = names[name]
    fields = _known(argument, kind, fields)
    if isinstance(fields.get("pattern"), dict):
        fields["pattern"] = AttentionPattern(**fields["pattern"])
    try:
        return kind(**fields)
    except TypeError as error:
        raise ArgumentError(argument, f"the fields of {kind.__name__}", str(error)) from error


def _key(recipe: Recipe, model: nn.Module, dataset: Any) -> str:
    """Hash of everything the variants depend on: recipe, baseline tensors, data set."""
    sizes = [getattr(dataset, n, None) for n in ("n_users", "n_items", "history_length")]
    manifest = getattr(dataset, "manifest", None)
    return tensors_digest(model.state_dict(), recipe.to_dict(), sizes, manifest)

"""``distill``: train a small student on a large teacher's scores and attention maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.compress.hidden_states import (
    Pairs,
    check_pairs,
    hidden_distance,
    pair_layers,
    record_hidden,
)
from fastrec.compress.selection import call_model, check_model
from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.models import record_attention
from fastrec.nn.attention_map import AttentionMap
from fastrec.train import TrainConfig, TrainReport, fit

_MASKED = -1e30  # a score whose exponential is 0
LossFn = Callable[[nn.Module, Any], Tensor]
Map: TypeAlias = Tensor | AttentionMap


@dataclass(frozen=True)
class Forward:
    """Outputs of one model for one batch.

    Args:
        scores: [..., C], the model's output.
        maps: attention maps [B, H, Lq, Lk], in the order of execution; empty unless recorded.
        length: int64 [B], valid positions of each history, or None where the batch has none.
        label: int64 [...], the column of ``scores`` with the positive, or None.
        hidden: outputs of layers, by name; empty unless recorded.
    """

    scores: Tensor
    maps: Sequence[Map] = ()
    length: Tensor | None = None
    label: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)


class DistillLoss(Protocol):
    """One term of the loss: a scalar from both models' outputs, scaled by ``weight``."""

    weight: float

    def __call__(self, student: Forward, teacher: Forward) -> Tensor: ...


@dataclass(frozen=True)
class LogitKL:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last dimension, batch mean.

    T^2 keeps the gradient's size independent of T (Hinton et al. 2015, section 2). A candidate that
    either model masks with -inf has no part in it.
    """

    temperature: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)
        _check_positive("weight", self.weight, zero=True)

    def __call__(self, student: Forward, teacher: Forward) -> Tensor:
        if student.scores.shape != teacher.scores.shape:
            raise ShapeError(
                "student",
                f"scores of the teacher's shape {list(teacher.scores.shape)}",
                list(student.scores.shape),
            )
        target = teacher.scores.float() / self.temperature
        own = student.scores.float() / self.temperature
        masked = target.isneginf() | own.isneginf()
        if bool(masked.any()):
            # finite, so that 0 times it is 0; a row that is masked throughout is alike in both
            target, own = (scores.masked_fill(masked, _MASKED) for scores in (target, own))
        target = target.log_softmax(-1).flatten(0, -2)
        own = own.log_softmax(-1).flatten(0, -2)
        divergence = F.kl_div(own, target, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


@dataclass(frozen=True)
class HardLabel:
    """Cross entropy against the batch's label, so that the student may correct its teacher."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("weight", self.weight, zero=True)

    def __call__(self, student: Forward, teacher: Forward) -> Tensor:
        if student.label is None:
            raise ArgumentError(
                "loader", "batches with a label: an attribute, or (inputs, label)", "none"
            )
        return F.cross_entropy(student.scores.float().flatten(0, -2), student.label.flatten())


@dataclass(frozen=True)
class AttentionMapKL:
    """KL(S_teacher || S_student) of the attention maps (paper, III-C), mean over valid query rows.

    A student's map is paired with a teacher's of the same (queries, keys): the j-th of n with the
    ceil(j N / n)-th of the teacher's N, so that the last learns from the last. Heads: where the
    numbers differ, neighbouring heads of the richer model are averaged (all heads, where neither
    number divides the other). The teacher's weights are taken over the keys that the student sees
    (its pattern) and made to add up to one. Keys beyond a history's length have no weight in the
    teacher's map and so none here; query rows beyond it, and users without history, do not count.

    Self-attention with as many heads as the teacher's runs on the ``attention_map_kl`` kernel,
    which never holds an L x L map; other maps are computed in torch.

    Args:
        weight: of this term.
        layers: (student map, teacher map) index pairs in place of the pairing above.
    """

    weight: float = 1.0
    layers: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        _check_positive("weight", self.weight, zero=True)

    def __call__(self, student: Forward, teacher: Forward) -> Tensor:
        pairs = self.layers or pair_maps(student.maps, teacher.maps)
        terms = []
        for own, target in pairs:
            if own >= len(student.maps) or target >= len(teacher.maps):
                raise ArgumentError(
                    "layers",
                    f"indices below {len(student.maps)} (student), {len(teacher.maps)} (teacher)",
                    (own, target),
                )
            terms.append(self._term(student.maps[own], teacher.maps[target], student.length))
        return torch.stack(terms).mean()

    @staticmethod
    def _term(own: Map, target: Map, length: Tensor | None) -> Tensor:
        if isinstance(own, AttentionMap) and isinstance(target, AttentionMap):
            value = own.divergence(target, length)
            if value is not None:
                return value
        own, target = (x if isinstance(x, Tensor) else x.weights() for x in (own, target))
        return map_divergence(own, target, length)


@dataclass(frozen=True)
class HiddenStates:
    """Distance of the layers' outputs, a share of the teacher's variance; mean over the pairs.

    Widths may differ: see :func:`~fastrec.compress.hidden_states.hidden_distance`. Rows beyond a
    history's length do not count.

    Args:
        weight: of this term.
        layers: (student module, teacher module) names; None pairs the entries of each model's
            longest ``nn.ModuleList``, the last with the last.
    """

    weight: float = 1.0
    layers: Pairs | None = None

    def __post_init__(self) -> None:
        _check_positive("weight", self.weight, zero=True)

    def pairs(self, student: nn.Module, teacher: nn.Module) -> Pairs:
        """The pairs of names, checked.

        Raises:
            ArgumentError: a name that is not a submodule, or models without a list of layers.
        """
        pairs = pair_layers(student, teacher) if self.layers is None else self.layers
        check_pairs(pairs, student, teacher)
        return pairs

    def __call__(self, student: Forward, teacher: Forward) -> Tensor:
        names = self.layers or tuple(zip(student.hidden, teacher.hidden, strict=True))
        terms = [
            hidden_distance(student.hidden[own], teacher.hidden[guide], student.length)
            for own, guide in names
        ]
        return torch.stack(terms).mean()


@dataclass(frozen=True)
class DistillReport:
    """Result of :func:`distill`: the training report, and each term's unweighted mean over the last
    100 steps."""

    train: TrainReport
    losses: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return {"train": self.train.to_dict(), "losses": self.losses}


def pair_maps(student: Sequence[Map], teacher: Sequence[Map]) -> list[tuple[int, int]]:
    """(student index, teacher index) of the maps that learn from each other.

    Raises:
        ArgumentError: no maps, or a student's map that has no counterpart of its shape.
    """
    if not student or not teacher:
        raise ArgumentError(
            "losses",
            "AttentionMapKL only for models whose attention fastrec records (fastrec.models)",
            f"{len(student)} student and {len(teacher)} teacher maps",
        )
    pairs = []
    for index, own in enumerate(student):
        alike = [i for i, m in enumerate(teacher) if m.shape[-2:] == own.shape[-2:]]
        if not alike:
            raise ArgumentError(
                "student",
                f"attention maps of the teacher's shapes {sorted({m.shape[-2:] for m in teacher})}",
                f"map {index} with {tuple(own.shape[-2:])}",
            )
        mine = [i for i, m in enumerate(student) if m.shape[-2:] == own.shape[-2:]]
        rank = mine.index(index) + 1
        pairs.append((index, alike[math.ceil(rank * len(alike) / len(mine)) - 1]))
    return pairs


def map_divergence(student: Tensor, teacher: Tensor, length: Tensor | None) -> Tensor:
    """KL(teacher || student) of maps [B, Hs, Lq, Lk] and [B, Ht, Lq, Lk], mean over valid rows.

    Raises:
        ShapeError: batch, queries or keys differ.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[-2:] != teacher.shape[-2:]:
        raise ShapeError("student", f"maps {list(teacher.shape)}", list(student.shape))
    n_heads = math.gcd(student.shape[1], teacher.shape[1])
    if n_heads not in (student.shape[1], teacher.shape[1]):
        n_heads = 1
    own = student.float().unflatten(1, (n_heads, -1)).mean(2)
    target = teacher.float().unflatten(1, (n_heads, -1)).mean(2)
    # Over the student's pattern: what it cannot see, it cannot learn; so the teacher's weights
    # there are left out, and the rest made to add up to one. Rows without any rest count nothing.
    target = torch.where(own > 0, target, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
    # xlogy: a key without weight in the teacher's map adds 0 for every student. The clamp keeps a
    # key that the student cannot see (another pattern, underflow) finite.
    rows = (torch.xlogy(target, target) - target * own.clamp_min(1e-9).log()).sum(-1)  # [B, H, Lq]
    if length is None:
        return rows.mean()
    queries = rows.shape[-1]
    if queries == student.shape[-1]:
        valid = torch.arange(queries, device=rows.device) < length[:, None]
    else:
        valid = (length > 0)[:, None].expand(-1, queries)
    weight = valid[:, None].to(rows.dtype)  # [B, 1, Lq]
    return (rows * weight).sum() / (weight.sum() * n_heads).clamp_min(1.0)


def distillation_loss(
    teacher: nn.Module,
    losses: Sequence[DistillLoss] | None = None,
    *,
    record: Callable[[str, float], None] | None = None,
) -> LossFn:
    """``loss_fn(student, batch)`` for :func:`fastrec.train.fit`: the weighted sum of ``losses``.

    The teacher runs in eval mode without gradients and is otherwise left as it is.

    Args:
        teacher: the trained model.
        losses: terms; default :class:`HardLabel` + :class:`LogitKL` + :class:`AttentionMapKL`.
        record: called with (term's class name, value) at every step.
    """
    teacher = check_model(teacher)
    terms = (HardLabel(), LogitKL(), AttentionMapKL()) if losses is None else tuple(losses)
    if not terms or not all(callable(term) and hasattr(term, "weight") for term in terms):
        raise DtypeError("losses", "LogitKL, AttentionMapKL, HardLabel, ...", repr(losses))
    needs_maps = any(isinstance(term, AttentionMapKL) for term in terms)
    states = [term for term in terms if isinstance(term, HiddenStates)]

    def loss_fn(student: nn.Module, batch: Any) -> Tensor:
        inputs, label = _split(batch)
        device = next(student.parameters()).device
        length = getattr(batch, "length", None)
        length = None if length is None else torch.as_tensor(length, device=device)
        label = None if label is None else torch.as_tensor(label, device=device)
        training = teacher.training
        teacher.eval()
        pairs = [pair for term in states for pair in term.pairs(student, teacher)]
        with torch.no_grad():
            guide = _forward(teacher, inputs, length, label, needs_maps, [p[1] for p in pairs])
        teacher.train(training)
        own = _forward(student, inputs, length, label, needs_maps, [p[0] for p in pairs])
        total = own.scores.new_zeros(())
        for term in terms:
            if term.weight == 0:
                continue
            if isinstance(term, HiddenStates):
                value = HiddenStates(term.weight, term.pairs(student, teacher))(own, guide)
            else:
                value = term(own, guide)
            if record is not None:
                record(type(term).__name__, float(value.detach()))
            total = total + term.weight * value
        return total

    return loss_fn


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    losses: Sequence[DistillLoss] | None = None,
    *,
    config: TrainConfig | None = None,
    progress: bool = False,
    on_step: Callable[[int, float], bool | None] | None = None,
) -> DistillReport:
    """Train ``student`` in place to reproduce the outputs of ``teacher``.

    Args:
        student: the small model; takes the same inputs and returns scores of the same shape.
        teacher: the trained model; unchanged.
        loader: iterable of batches: ``SequenceBatch``, or (inputs, label) with inputs a tensor or
            tuple. Read once an epoch: with more than one epoch it must be iterable again.
        losses: see :func:`distillation_loss`.
        config: learning rate, epochs, ... of :func:`fastrec.train.fit`; its batch settings do not
            apply. ``max_steps`` is needed where ``loader`` has no length.
        progress: show a progress bar on standard error.
        on_step: see :func:`fastrec.train.fit`.

    Raises:
        ArgumentError: student and teacher are one or share trained parameters, a loader that is
            empty or of unknown length, batches without a label, attention maps that cannot be
            matched.
        ShapeError: the scores differ in shape.
    """
    check_model(student)
    if student is teacher:
        raise ArgumentError("teacher", "another model than the student", "the same")
    teachers = set(map(id, teacher.parameters()))
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and id(parameter) in teachers:
            raise ArgumentError(
                "student", "parameters of its own, or frozen ones", f"{name!r}, the teacher's too"
            )
    config = TrainConfig(epochs=1) if config is None else config
    steps = len(loader) if isinstance(loader, Sized) else config.max_steps
    if not steps:
        raise ArgumentError(
            "loader", "at least one batch, or config.max_steps where it has no length", steps
        )
    recent: dict[str, list[float]] = {}

    def record(name: str, value: float) -> None:
        values = recent.setdefault(name, [])
        values.append(value)
        del values[:-100]

    report = fit(
        student,
        _Size(steps * config.batch_size),
        dataclasses.replace(config, valid_users=0),
        loss_fn=distillation_loss(teacher, losses, record=record),
        batches=lambda epoch: loader,
        progress=progress,
        on_step=on_step,
    )
    return DistillReport(report, {name: sum(v) / len(v) for name, v in recent.items()})


@dataclass(frozen=True)
class _Size:
    """Stand-in for the dataset whose size ``fit`` asks for; the batches come from the loader."""

    examples: int

    def num_examples(self, split: str) -> int:
        return self.examples


def _split(batch: Any) -> tuple[Any, Any]:
    if hasattr(batch, "inputs") and callable(batch.inputs):
        return batch.inputs(), getattr(batch, "label", None)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def _forward(
    model: nn.Module,
    inputs: Any,
    length: Tensor | None,
    label: Tensor | None,
    needs_maps: bool,
    layers: Sequence[str],
) -> Forward:
    with ExitStack() as stack:
        maps = stack.enter_context(record_attention(model)) if needs_maps else []
        hidden = stack.enter_context(record_hidden(model, layers))
        scores = call_model(model, inputs)
        return Forward(scores, list(maps), length, label, hidden)


def _check_positive(argument: str, value: Any, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ArgumentError(argument, "a positive number" + " or 0" * zero, repr(value))

"""Distillation of hidden states: the student's layers learn the outputs of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrec.errors import ArgumentError, ShapeError

Pairs = tuple[tuple[str, str], ...]


def pair_layers(student: nn.Module, teacher: nn.Module) -> Pairs:
    """(student layer, teacher layer) names: the entries of each model's longest ``nn.ModuleList``,
    the j-th of n with the ceil(j N / n)-th of N.

    Raises:
        ArgumentError: a model without a list of layers.
    """
    own, guide = _layers("student", student), _layers("teacher", teacher)
    return tuple(
        (name, guide[math.ceil((j + 1) * len(guide) / len(own)) - 1]) for j, name in enumerate(own)
    )


def _layers(argument: str, model: nn.Module) -> list[str]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ArgumentError(
            argument, "layers in an nn.ModuleList, or HiddenStates(layers=...) with names", "none"
        )
    name, found = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{index}".lstrip(".") for index in range(len(found))]


def check_pairs(pairs: Pairs, student: nn.Module, teacher: nn.Module) -> None:
    """ArgumentError if a name is not a submodule."""
    for own, guide in pairs:
        for argument, model, name in (("student", student, own), ("teacher", teacher, guide)):
            names = dict(model.named_modules())
            if name not in names:
                shown = ", ".join(sorted(names, key=len)[1:6])
                raise ArgumentError("layers", f"modules of the {argument}: {shown}, ...", name)


@contextmanager
def record_hidden(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named modules; of a tuple its first element."""
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(n).register_forward_hook(hook_for(n)) for n in set(names)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden_distance(student: Tensor, teacher: Tensor, length: Tensor | None) -> Tensor:
    """Distance between hidden states, as a share of the teacher's variance.

    States [B, L, d] (or any leading sizes). Same width: squared distance. Different widths: the
    residual of the best linear map from the student's to the teacher's, solved by least squares for
    each batch, so that no projection has to be trained.

    Raises:
        ShapeError: leading sizes differ.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            "student", f"hidden states {[*teacher.shape[:-1], 'd']}", list(student.shape)
        )
    own, guide = student.float(), teacher.detach().float()
    if length is not None and own.dim() == 3:
        valid = torch.arange(own.shape[1], device=own.device) < length[:, None]
        weight = valid[..., None].to(own.dtype)
    else:
        weight = torch.ones_like(own[..., :1])
    rows = weight.sum().clamp_min(1.0)

    def centred(x: Tensor) -> Tensor:
        x = torch.where(weight > 0, x, 0.0)
        mean = x.flatten(0, -2).sum(0) / rows
        return ((x - mean) * weight).flatten(0, -2)

    target = centred(guide)
    spread = target.square().sum().clamp_min(1e-12)
    if own.shape[-1] == guide.shape[-1]:
        difference = (torch.where(weight > 0, own - guide, 0.0)).square().sum()
        return difference / spread
    source = centred(own)
    with torch.no_grad():
        # At the optimum the map's own change has no effect on the residual, to first order.
        gram = source.T @ source
        ridge = 1e-4 * gram.diagonal().mean().clamp_min(1e-12)
        gram = gram + ridge * torch.eye(len(gram), device=gram.device)
        best = torch.linalg.solve(gram, source.T @ target)
    return (source @ best - target).square().sum() / spread

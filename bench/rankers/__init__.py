"""Rankers in the idioms of public recommenders, in sizes as their papers have them.

Each is our own small statement of how such models are written: layers, masks and shapes as people
write them, random weights. :data:`MODELS` has them all, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from rankers import features, histories

Inputs = tuple[torch.Tensor, ...]


class Idiom(NamedTuple):
    """A model, and its inputs for a batch size and a seed."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]


MODELS: dict[str, Idiom] = {
    name: Idiom(build, inputs)
    for found in (histories.MODELS, features.MODELS)
    for name, (build, inputs) in found.items()
}

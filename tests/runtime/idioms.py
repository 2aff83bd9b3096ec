"""Own small modules in the idioms of public recommenders, compiled and held against torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import fastrec


class Idioms(nn.Module):
    """Results of several functions of the same inputs, by name."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = dict(functions)

    def forward(self, *inputs: torch.Tensor) -> dict[str, Any]:
        return {name: function(*inputs) for name, function in self.functions.items()}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def ids(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(name: str, ours: Any, wanted: Any) -> None:
    """Equal structure, dtypes and integers; floats within 1e-4 of the largest."""
    if isinstance(wanted, torch.Tensor):
        assert ours.dtype == wanted.dtype, name
        assert ours.shape == wanted.shape, name
        if not wanted.is_floating_point():
            assert torch.equal(ours, wanted), name
            return
        finite = wanted[torch.isfinite(wanted)]
        scale = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(
            ours,
            wanted,
            rtol=1e-4,
            atol=1e-4 * max(scale, 1e-6),
            equal_nan=True,
            msg=lambda text: f"{name}: {text}",
        )
    elif isinstance(wanted, Mapping):
        assert list(ours) == list(wanted), name
        for key, value in wanted.items():
            close(f"{name}.{key}", ours[key], value)
    elif isinstance(wanted, list | tuple):
        assert type(ours) is type(wanted), name
        assert len(ours) == len(wanted), name
        for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
            close(f"{name}[{i}]", a, b)
    else:
        assert ours == wanted, name


def agrees(
    model: nn.Module | Mapping[str, Callable[..., Any]],
    inputs: Callable[[int], tuple[Any, ...]],
    *,
    batches: tuple[int, ...] = (3, 1, 5),
    **options: Any,
) -> fastrec.runtime.engine.Engine:
    """One plan of the model, whose results are torch's at these batch sizes.

    Args:
        model: or functions of the inputs, by name.
        inputs: those of a batch size; the first batch size is compiled.
        batches: sizes that are tried.
        options: of ``fastrec.compile``.
    """
    if isinstance(model, Mapping):
        model = Idioms(model)
    model.eval()
    engine = fastrec.compile(
        model, inputs(batches[0]), backend="native", threads=1, fallback="error", **options
    )
    for batch in batches:
        given = inputs(batch)
        with torch.inference_mode():
            wanted = model(*copy.deepcopy(given))
        close("result", engine(*given), wanted)
    return engine

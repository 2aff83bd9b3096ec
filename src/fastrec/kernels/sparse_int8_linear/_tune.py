"""The shapes of ``sparse_int8_linear`` that ``fastrec tune`` times: those of rankers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from fastrec.kernels import _tuning
from fastrec.kernels.sparse_int8_linear import _cuda
from fastrec.kernels.sparse_int8_linear._gpu import prepare
from fastrec.kernels.sparse_int8_linear.samples import random_weight

# One user's candidates to 64 users', and one row; a tower's layers, dense and pruned.
ROWS = (1, 8, 50, 400, 3200)
LAYERS = ((1024, 384), (1024, 1024), (512, 128), (128, 512))
DENSITIES = (1.0, 0.6, 0.5, 0.25)


@dataclass(frozen=True)
class Shape:
    """M rows of a layer of N outputs and K inputs that keeps a share of its groups, whole or 2 of
    every 4 inputs."""

    rows: int
    outputs: int
    inputs: int
    density: float
    two_four: bool = False

    def __str__(self) -> str:
        kind = "2:4" if self.two_four else f"density {self.density:g}"
        return f"M={self.rows} N={self.outputs} K={self.inputs} {kind}"


def shapes() -> list[Shape]:
    """All of them."""
    kinds = [*((density, False) for density in DENSITIES), (1.0, True)]
    each = itertools.product(LAYERS, kinds, ROWS)
    large = [Shape(4096, 4096, 4096, *kind) for kind in ((1.0, False), (0.5, False), (1.0, True))]
    return [*(Shape(rows, *layer, *kind) for layer, kind, rows in each), *large]


def tune(shape: Shape) -> str:
    """Times a shape on the current GPU, keeps its fastest configuration and says which."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.outputs, shape.inputs, shape.density)
    packed = random_weight(*sizes, generator, two_four=shape.two_four).to("cuda")
    prepared = prepare(
        packed,
        x_scale=0.02,
        x_zero_point=128,
        bias=None,
        activation="relu",
        out="uint8",
        out_scale=1.0,
        out_zero_point=0,
    )
    x = torch.randint(0, 256, (shape.rows, shape.inputs), dtype=torch.uint8, device="cuda")
    y = torch.empty(shape.rows, shape.outputs, dtype=torch.uint8, device="cuda")
    best = _cuda.tune(prepared, x, y)
    time_ms = _tuning.device_time_ms(lambda: _cuda.run(prepared, x, y, best))
    return f"{shape}: {1e3 * time_ms:.1f} us, {best}"


def table() -> _tuning.Table:
    """The table of the current GPU."""
    return _cuda.table(torch.cuda.current_device())

"""The whole ranker's launches for GPUs that need not be there: matrix units, no spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_of_time import TARGETS, check, compiled

import fastrec
from fastrec import env
from fastrec.exporters.model_spec import spec_of
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime.native.lower import lower
from fastrec.runtime.native.passes import simplify

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    """The canonical ranker's, with small tables, as a float and as an int8 model."""
    from fastrec.runtime.cuda.match import match

    torch.manual_seed(0)
    model = Ranker(RankerConfig(n_items=1000, n_categories=100)).eval()
    spec = spec_of(model, ())
    inputs = tuple(map(torch.from_numpy, spec.sample({"B": 2, "L": 100, "m": 50})))
    found = {}
    for precision in ("bf16", "int8"):
        if precision == "int8":
            fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
        plan = lower(model, inputs, spec)
        simplify(plan)
        found[precision] = match(plan)
    return found


def launches(stages: Any, precision: str, users: int, target: str, persistent: bool = True) -> Any:
    """Those of a batch, as the engine makes them on a GPU of 132 multiprocessors."""
    from fastrec.runtime.cuda.config import Sizes
    from fastrec.runtime.cuda.launches import Bucket
    from fastrec.runtime.cuda.weights import Weights

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = Weights(stages, dtype, torch.device("cpu"))
    amd = target.startswith("gfx")
    products = "ieee" if amd or precision == "bf16" else "tf32x3"
    sizes = Sizes(users, 128, 64)
    return Bucket(stages, weights, sizes, products, persistent, amd=amd).launches


def build(launch: Any, target: str) -> Any:
    """The kernel that a launch would compile."""
    from fastrec.runtime.cuda.config import RowsConfig, TowerConfig

    assert isinstance(launch.config, RowsConfig | TowerConfig)
    names = [n for n in launch.kernel.arg_names if n not in launch.options]
    assert len(names) == len(launch.args)
    pointers = {}
    for name, value in zip(names, launch.args, strict=True):
        if isinstance(value, torch.Tensor):
            pointers[name] = TYPES[value.dtype]
        else:
            pointers[name] = "fp32" if isinstance(value, float) else "i32"
    constants = {k: v for k, v in launch.options.items() if k in launch.kernel.arg_names}
    options = {k: v for k, v in launch.options.items() if k not in constants}
    scalars = tuple(n for n, kind in pointers.items() if not kind.startswith("*"))
    if launch.kernel.__name__ == "tower":
        options["launch_cooperative_grid"] = True
    return compiled(launch.kernel, target, pointers, constants, scalars, **options)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("users", [1, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_runs_on_matrix_units_unspilled(
    stages: dict[str, Any], target: str, users: int, precision: str, tmp_path: Path
) -> None:
    made = launches(stages[precision], precision, users, target)
    names = [launch.kernel.__name__ for launch in made]
    assert names == ["history", "encoder_block", "encoder_block", "candidates", "tower"]
    for launch in (made[0], made[2], made[3], made[4]):
        # The matrix units of sm_100 that take 64 rows and more have no integers.
        few = precision == "int8" and target == "sm_100"
        rows = 16 if few else launch.config.rows
        check(build(launch, target), target, tmp_path, matrices=True, rows=rows)


@pytest.fixture(scope="module")
def pruned() -> Any:
    """The canonical tower's shapes, of whose groups 40 % are gone."""
    from fastrec.runtime.cuda.match import match

    torch.manual_seed(0)
    model = Ranker(RankerConfig(n_items=100, n_categories=10)).eval()
    spec = spec_of(model, ())
    inputs = tuple(map(torch.from_numpy, spec.sample({"B": 2, "L": 100, "m": 50})))
    fastrec.prune_(
        model, fastrec.BlockPruning(sparsity=0.4), filter_fn=lambda m, name: name.startswith("tow")
    )
    fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    plan = lower(model, inputs, spec)
    simplify(plan)
    return match(plan)


@pytest.mark.parametrize("target", TARGETS)
def test_a_tower_that_skips_runs_on_matrix_units_unspilled(
    pruned: Any, target: str, tmp_path: Path
) -> None:
    *_, tower = launches(pruned, "int8", 1, target)
    assert tower.options["SKIPS"]
    *_, dense = launches(pruned, "int8", 64, target)
    assert not dense.options["SKIPS"]  # activations would be read too often
    full = 64 * sum(n * k for n, k, *_ in tower.args[2][:, :2].tolist())
    assert tower.macs < 0.7 * full
    check(build(tower, target), target, tmp_path, matrices=True, rows=16)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_launch_a_layer_compiles(stages: dict[str, Any], target: str, tmp_path: Path) -> None:
    *_, first, last, sums = launches(stages["int8"], "int8", 1, target, persistent=False)
    assert last.options["LAST"]
    for launch in (first, last):
        check(build(launch, target), target, tmp_path, matrices=True, rows=launch.config.rows)
    check(build(sums, target), target, tmp_path, matrices=False)


def test_the_persistent_tower_waits_at_gpu_scope(stages: dict[str, Any]) -> None:
    ptx = build(launches(stages["int8"], "int8", 64, "sm_90")[-1], "sm_90").asm["ptx"]
    at_gpu_scope = [line for line in ptx.splitlines() if ".gpu." in line]
    assert any("atom." in line and ".acq_rel" in line for line in at_gpu_scope)
    assert any(".acquire" in line for line in at_gpu_scope)

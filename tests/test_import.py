"""``import fastrec`` is light, silent and works with nothing optional installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastrec

HEAVY = ("torch", "numpy.random", "polars", "matplotlib", "onnxruntime", "openvino", "nncf")


def run(code: str, *, block: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which the modules of ``block`` can't be imported."""
    prelude = f"import sys\nfor name in {block!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_import_loads_nothing_heavy_and_prints_nothing() -> None:
    code = f"import fastrec, sys\nassert not set(sys.modules) & set({HEAVY!r})\n"
    code += "assert 'fastrec._native' not in sys.modules"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


def test_kernels_import_without_torch() -> None:
    code = "from fastrec import kernels\nprint(kernels.available_isas())"
    result = run(code, block=("torch",))
    assert result.returncode == 0, result.stderr
    assert "scalar" in result.stdout


def test_without_the_compiled_part_the_reference_runs() -> None:
    code = """
import torch
from fastrec.nn import SparseInt8Linear
torch.manual_seed(0)
layer = SparseInt8Linear.from_float(torch.nn.Linear(8, 3), x_scale=0.1, x_zero_point=128)
print(layer(torch.ones(2, 8)).shape)
from fastrec import kernels
try:
    kernels.active_isa()
except fastrec.errors.BackendError as error:
    print(error)
"""
    result = run("import fastrec\n" + code, block=("fastrec._native",))
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 3])" in result.stdout
    assert "the compiled CPU kernels are not installed" in result.stdout


@pytest.mark.parametrize("name", fastrec.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(fastrec, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'speed_up'"):
        _ = fastrec.speed_up


def test_without_torch_each_name_that_needs_it_says_how_to_install_it() -> None:
    code = """
import fastrec
from fastrec.errors import MissingDependencyError
for name in ("prune_", "compile", "export", "accelerate", "autotune", "models.Ranker", "train.fit"):
    *room, name = name.split(".")
    try:
        getattr(getattr(fastrec, room[0]) if room else fastrec, name)
    except MissingDependencyError as error:
        assert "pip install 'fastrec-kernels[torch]'" in str(error), error
    else:
        raise AssertionError(name)
print(fastrec.runtime.load_engine.__name__)
"""
    result = run(code, block=("torch",))
    assert result.returncode == 0, result.stderr
    assert "load_engine" in result.stdout

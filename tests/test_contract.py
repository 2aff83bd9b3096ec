"""Every op x backend x instruction set x case, walked from the registry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastrec import kernels
from fastrec.errors import BackendError
from fastrec.kernels._compiled import Signature, reason_missing
from fastrec.kernels._registry import OpSpec, Sample

SPECS = kernels.registry()
# The scalar twin and the references run the bench's large shapes for minutes: small ones suffice.
SMALL_MACS = 2_000_000


def cases() -> Iterator[object]:
    isas = ["none"]
    if not reason_missing():  # FASTREC_FORCE_ISA is a ceiling here too
        isas = kernels.available_isas()
        isas = isas[: isas.index(kernels.active_isa()) + 1]
    for op_id, spec in SPECS.items():
        for backend in spec.backends.can_run:
            for isa in isas if backend == "cpu" else ["any"]:
                for sample in spec.samples():
                    if isa in ("scalar", "any") and sample.macs > SMALL_MACS:
                        continue
                    yield pytest.param(
                        spec, backend, isa, sample, id=f"{op_id}-{backend}-{isa}-{sample.name}"
                    )


@pytest.mark.parametrize(("spec", "backend", "isa", "sample"), list(cases()))
def test_agrees_with_reference(spec: OpSpec, backend: str, isa: str, sample: Sample) -> None:
    if (reason := spec.backends.can_run[backend](Signature("cpu"))) is not None:
        pytest.skip(reason)
    args, kwargs = sample.make()
    if isa == "any":
        spec.compare(spec.function(*args, **kwargs, backend=backend), args, kwargs)
        return
    with kernels.force_isa(isa):
        assert kernels.isa_names().index(spec.kernel_isa()) <= kernels.isa_names().index(isa)
        spec.compare(spec.function(*args, **kwargs, backend=backend), args, kwargs)


@pytest.mark.parametrize("op_id", SPECS)
def test_threads_do_not_change_the_result(op_id: str) -> None:
    if reason := reason_missing():
        pytest.skip(reason)
    spec = SPECS[op_id]
    sample = max(spec.samples(), key=lambda s: s.macs)
    args, kwargs = sample.make()
    with kernels.call_threads(1):
        alone = spec.function(*args, **kwargs)
    with kernels.call_threads(64):  # capped at what the machine has
        together = spec.function(*args, **kwargs)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("op_id", SPECS)
def test_a_backend_asked_for_by_name_runs_or_says_why(op_id: str) -> None:
    spec = SPECS[op_id]
    with pytest.raises(BackendError, match=r"expected one of cpu, reference, got 'gpu9'"):
        spec.backends.choose(Signature("cpu"), "gpu9")
    with pytest.raises(BackendError, match=r"'cpu' can't run: it runs on the CPU.*on cuda"):
        spec.backends.choose(Signature("cuda"), "cpu")
    assert spec.backends.choose(Signature("cuda")) == "reference"


@pytest.mark.parametrize("op_id", SPECS)
def test_environment_forces_the_backend(op_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[op_id]
    monkeypatch.setenv("FASTREC_FORCE_BACKEND", "reference")
    assert spec.backends.choose(Signature("cpu")) == "reference"
    monkeypatch.setenv("FASTREC_FORCE_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        spec.backends.choose(Signature("cpu"))


@pytest.mark.parametrize("op_id", SPECS)
def test_an_ops_names_are_the_same_everywhere(op_id: str) -> None:
    assert SPECS[op_id].op_id == op_id
    assert hasattr(torch.ops.fastrec, op_id)
    assert getattr(kernels, op_id) is SPECS[op_id].function

"""Every op x backend x instruction set x case, walked from the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


def mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The arguments with every tensor changed, those in lists too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(part, change) for part in value)
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


def same_bits(one: Any, other: Any) -> bool:
    return all(
        a.dtype is b.dtype
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, none next to another."""
    wide = torch.full((*tensor.shape, 2), 1, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def leave_behind(number: float, like: Any) -> None:
    """Frees memory of the result's size, full of the number: most likely the next result's."""
    junk = [torch.full_like(t, number) for t in tensors(like) for _ in range(3)]
    del junk


@pytest.mark.parametrize("isa", [] if reason_missing() else kernels.available_isas())
@pytest.mark.parametrize("op_id", SPECS)
def test_inputs_and_outputs_are_whole(op_id: str, isa: str) -> None:
    """Strided inputs give the same bits, inputs stay as they are, outputs hold no old memory."""
    spec = SPECS[op_id]
    with kernels.force_isa(isa):
        for sample in spec.samples():
            if sample.macs > SMALL_MACS // 40:
                continue
            args, kwargs = sample.make()
            before = mapped((args, kwargs), torch.clone)
            result = spec.function(*args, **kwargs)
            assert same_bits((args, kwargs), before), f"{sample.name}: an input was written to"
            for number in (float("nan"), 7.0):
                if number == number or all(t.is_floating_point() for t in tensors(result)):
                    leave_behind(number, result)
                again = spec.function(*args, **kwargs)
                assert same_bits(again, result), f"{sample.name}: old memory in the output"
            apart_args, apart_kwargs = mapped((args, kwargs), with_gaps)
            apart = spec.function(*apart_args, **apart_kwargs)
            assert same_bits(apart, result), f"{sample.name}: strides change the result"


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
    names = ", ".join(spec.backends.can_run)
    with pytest.raises(BackendError, match=f"expected one of {names}, got 'gpu9'"):
        spec.backends.choose(Signature("cpu"), "gpu9")
    with pytest.raises(BackendError, match=r"'cpu' can't run: it runs on the CPU.*on cuda"):
        spec.backends.choose(Signature("cuda"), "cpu")
    ours = [name for name in ("cuda", "triton") if name in spec.backends.can_run]
    able = [name for name in ours if spec.backends.can_run[name](Signature("cuda")) is None]
    expected = able[0] if able else "reference"
    assert spec.backends.choose(Signature("cuda")) == expected


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

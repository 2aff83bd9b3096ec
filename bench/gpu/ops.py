"""Every op with a GPU kernel on its bench samples, beside torch's reference."""

from __future__ import annotations

from typing import Any

import torch

from fastrec import kernels
from fastrec.kernels._registry import OpSpec, Sample
from gpu.sheet import Contender, Sheet, Work
from gpu.timing import Call


def measure(sheet: Sheet) -> None:
    """A comparison a sample, while the time lasts."""
    for op_id, spec in kernels.registry().items():
        backends = [name for name in ("cuda", "triton") if name in spec.backends.can_run]
        for sample in [s for s in spec.samples() if s.bench] if backends else []:
            if sheet.left() < 5:
                sheet.add(what=f"{op_id} {sample.name}", engine="fastrec", why="no time was left")
            else:
                _sample(sheet, spec, sample, backends)


def _sample(sheet: Sheet, spec: OpSpec, sample: Sample, backends: list[str]) -> None:
    args, kwargs = sample.make()
    dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
    dtype = "int8" if torch.uint8 in dtypes else "bf16" if torch.bfloat16 in dtypes else "fp32"
    named = {
        name: value.cuda() for name, value in kwargs.items() if isinstance(value, torch.Tensor)
    }

    def inputs() -> tuple[Any, ...]:
        # Weights travel as they are; tensors are copies of their own.
        return tuple(a.cuda().clone() if isinstance(a, torch.Tensor) else _there(a) for a in args)

    def right(actual: Any, _: Any) -> str | None:
        try:
            spec.compare(actual.cpu(), args, kwargs)
        except AssertionError as error:
            return str(error)
        return None

    def ours(backend: str) -> Contender:
        def prepare(*there: Any) -> Call:
            return lambda: spec.function(*there, **(kwargs | named), backend=backend)

        return Contender(prepare, check=right)

    def torchs(*there: Any) -> Call:
        return lambda: spec.reference(*there, **(kwargs | named))

    contenders = {f"fastrec, {name}": ours(name) for name in backends}
    contenders["torch reference"] = Contender(torchs, check=right)
    work = Work(sample.bytes_moved, sample.macs, dtype)
    with torch.no_grad():
        sheet.compare(f"{spec.op_id} {sample.name}", work, inputs, contenders, lambda *_: None)


def _there(value: Any) -> Any:
    return value.to("cuda") if hasattr(value, "to") else value

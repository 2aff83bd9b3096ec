"""torch as it is: fp32, bf16 (autocast or a bf16 copy, whichever is faster), int8 dynamic."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from fastrec.exporters.model_spec import quantised_module
from fastrec.exporters.trace import evaluated
from fastrec.measure.choice import choice, fastest
from fastrec.runtime.backends._torch import (
    SPIN_S,
    Forward,
    TorchEngine,
    float_inputs,
    in_bf16,
    inference,
    reason_no_torch,
    refuse_requantising,
    torch_versions,
)
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.runtime.threads import with_torch_threads

PRECISIONS = ("fp32", "bf16", "int8")


def can_run() -> str | None:
    """None, or why not."""
    return reason_no_torch()


def versions() -> dict[str, str]:
    """Version of torch."""
    return torch_versions()


def build(
    model: nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Eager torch; settings: ``bf16`` ("cast" or "autocast")."""
    options.allow("bf16")
    quantised = quantised_module(model)
    refuse_requantising("torch", options.precision, quantised)
    candidates: dict[str, Forward]
    if options.precision == "bf16":
        wanted = options.setting("bf16", ("cast", "autocast"))
        candidates = {}
        if wanted != "cast":
            candidates["autocast"] = inference(evaluated(model), autocast=True)
        if wanted == "cast" or (wanted == "auto" and not float_inputs(example_inputs)):
            candidates["cast"] = inference(in_bf16(model))
    elif options.precision == "int8":
        candidates = {"dynamic, qint8 weights": inference(_dynamic_int8(model))}
    else:
        candidates = {"eager": inference(evaluated(model))}

    def at(forward: Forward) -> Any:
        return lambda *inputs: with_torch_threads(options.threads, forward, *inputs)

    best, rows = fastest(
        {name: at(f) for name, f in candidates.items()}, example_inputs, settle_s=SPIN_S
    )
    rows.append(choice(f"threads={options.threads}", True, None, "as asked"))
    precision = options.precision or ("fp32" if quantised is None else "int8")
    return TorchEngine(
        candidates[best],
        torch_threads=options.threads,
        backend="torch",
        precision=precision,
        threads=options.threads,
        spec=options.spec,
        rows=rows,
        versions=versions(),
    )


def _dynamic_int8(model: nn.Module) -> nn.Module:
    """Linear layers on FBGEMM, activations quantised on the fly; tables stay shared."""
    tables = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in [m.weight]}
    copied = copy.deepcopy(model, memo=dict(tables)).eval()
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, which has no faster CPU path and is not required here.
        warnings.simplefilter("ignore")
        quantised: nn.Module = torch.ao.quantization.quantize_dynamic(
            copied, {nn.Linear}, dtype=torch.qint8, inplace=True
        )
    return quantised

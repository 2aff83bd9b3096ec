"""fastrec's own kernels, op by op: the model's forward, whose fastrec.nn modules run on them.

The whole-model executor, which needs no torch, is a later version. What remains in torch (norms,
softmax, gathers) shares the cores with the kernels' pool, so its thread count is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastrec
from fastrec import kernels
from fastrec.errors import BackendError
from fastrec.kernels._compiled import reason_missing
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.runtime.backends._torch import (
    SPIN_S,
    Forward,
    TorchEngine,
    inference,
    reason_no_torch,
    torch_versions,
)
from fastrec.runtime.choose import fastest
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.runtime.model_spec import quantised_module
from fastrec.runtime.onnx_export import evaluated
from fastrec.runtime.threads import with_torch_threads

PRECISIONS = ("fp32", "int8")


def can_run() -> str | None:
    """None, or why not."""
    return reason_no_torch()


def versions() -> dict[str, str]:
    """Versions of fastrec and torch, and the instruction set of the kernels."""
    isa = "none" if reason_missing() else kernels.active_isa()
    return {"fastrec": fastrec.__version__, "isa": isa, **torch_versions()}


def build(
    model: nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """The model as it is; settings: ``torch_threads``."""
    options.allow("torch_threads")
    quantised = quantised_module(model)
    if options.precision == "int8" and quantised is None:
        raise BackendError(
            "native runs a model as it is, and this one holds no int8 module: call "
            "fastrec.quantize_(model, fastrec.Int8(), calibration=...) first"
        )
    if options.precision == "fp32" and quantised is not None:
        raise BackendError(f"native runs a model as it is, and {quantised} is int8")
    model = evaluated(model)
    forward = _with_kernel_threads(inference(model), options.threads)
    shares = sorted({1, options.threads})
    if "torch_threads" in options.settings:
        shares = [int(options.settings["torch_threads"])]
    names = {f"torch_threads={n}": n for n in shares}

    def at(threads: int) -> Callable[..., Any]:
        return lambda *inputs: with_torch_threads(threads, forward, *inputs)

    best, rows = fastest(
        {name: at(n) for name, n in names.items()}, example_inputs, settle_s=SPIN_S
    )
    return TorchEngine(
        forward,
        torch_threads=names[best],
        backend="native",
        precision="fp32" if quantised is None else "int8",
        threads=options.threads,
        spec=options.spec,
        rows=[*_module_rows(model, example_inputs), *rows],
        versions=versions(),
    )


def _with_kernel_threads(forward: Forward, threads: int) -> Forward:
    """The kernels' thread count around a call, put back afterwards."""
    if reason_missing():
        return forward

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        before = kernels.num_threads()
        if before == threads:
            return forward(*inputs)
        kernels.set_num_threads(threads)
        try:
            return forward(*inputs)
        finally:
            kernels.set_num_threads(before)

    return call


def _module_rows(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[dict[str, Any]]:
    """One row per module that holds parameters: op, kernel, density, bytes and MACs of a call."""
    calls: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Rows of a Linear's input: elements of the output over its last dimension.
            rows = output.numel() // max(output.shape[-1], 1)
            calls[name] = calls.get(name, 0) + rows

        return count

    leaves = {
        name: module
        for name, module in model.named_modules()
        if not any(module.children())
        and (any(True for _ in module.parameters()) or any(True for _ in module.buffers()))
    }
    hooks = [module.register_forward_hook(counter(name)) for name, module in leaves.items()]
    try:
        inference(model)(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [_row(name, module, calls.get(name, 0)) for name, module in leaves.items()]


def _row(name: str, module: nn.Module, rows: int) -> dict[str, Any]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    row: dict[str, Any] = {
        "module": name,
        "op": type(module).__name__,
        "kernel": "torch",
        "density": None,
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "macs": None,
        "why": "fastrec has no kernel of its own for this module",
    }
    if isinstance(module, SparseInt8Linear):
        reason = reason_missing()
        dense = rows * module.in_features * module.out_features
        row["op"] = "sparse_int8_linear"
        row["density"] = round(module.density, 4)
        row["macs"] = round(dense * module.density)
        row["kernel"] = "reference" if reason else f"cpu/{_kernel_isa()}"
        row["why"] = reason or "the newest instruction set this CPU has; zero groups are skipped"
    elif isinstance(module, Int8Embedding):
        row["why"] = "a gather of int8 rows, scaled to float32"
    elif isinstance(module, nn.Linear):
        row["macs"] = rows * module.in_features * module.out_features
        row["density"] = 1.0
        row["why"] = "a float layer: quantise it to run it on sparse_int8_linear"
    return row


def _kernel_isa() -> str:
    isa: str = kernels.registry()["sparse_int8_linear"].kernel_isa()
    return isa

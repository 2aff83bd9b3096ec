"""torch.compile (Inductor) with frozen weights, compiled in the build.

Measured on the canonical ranker: freezing gains about 5 % over eager in fp32; the C++ wrapper and
max-autotune (57 s of compiling) gain nothing more, so they are not used.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import nn

from fastrec.errors import BackendError
from fastrec.exporters.model_spec import quantised_module
from fastrec.exporters.trace import evaluated, first_line, quiet
from fastrec.measure.choice import choice
from fastrec.runtime.backends._torch import (
    Forward,
    TorchEngine,
    float_inputs,
    in_bf16,
    reason_no_torch,
    refuse_requantising,
    torch_versions,
)
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.runtime.threads import with_torch_threads

PRECISIONS = ("fp32", "bf16")


def can_run() -> str | None:
    """None, or why not: Inductor compiles C++ for the CPU."""
    if (reason := reason_no_torch()) is not None:
        return reason
    with quiet():
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, and none was found (g++ or clang++)"
    return None


def versions() -> dict[str, str]:
    """Version of torch."""
    return torch_versions()


def build(
    model: nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Compile for the example's shape; another shape compiles once, when it first comes."""
    options.allow()
    quantised = quantised_module(model)
    refuse_requantising("torch_compile", options.precision, quantised)
    autocast = options.precision == "bf16" and float_inputs(example_inputs)
    module = evaluated(model)
    if options.precision == "bf16" and not autocast:
        module = in_bf16(model)
    example_shapes = tuple([t.shape for t in example_inputs])
    with quiet():
        static = _compiled(module, dynamic=False, autocast=autocast)
        others = _compiled(module, dynamic=True, autocast=autocast)
    seen: set[tuple[torch.Size, ...]] = set()

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        shapes = tuple([t.shape for t in inputs])
        if shapes == example_shapes:
            return static(*inputs)
        if shapes not in seen:
            seen.add(shapes)
            with quiet():
                return others(*inputs)
        return others(*inputs)

    try:
        with quiet():
            for _ in range(2):
                with_torch_threads(options.threads, forward, *example_inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise BackendError(f"torch.compile failed: {first_line(error)}") from error
    kind = "autocast" if autocast else "parameters cast" if options.precision == "bf16" else "fp32"
    why = "freezing gains; max_autotune and cpp_wrapper measured no faster"
    precision = options.precision or ("fp32" if quantised is None else "int8")
    return TorchEngine(
        forward,
        torch_threads=options.threads,
        backend="torch_compile",
        precision=precision,
        threads=options.threads,
        spec=options.spec,
        rows=[choice(f"Inductor, freezing, static shapes, {kind}", True, None, why)],
        versions=versions(),
    )


def _compiled(module: nn.Module, *, dynamic: bool, autocast: bool) -> Forward:
    """torch.compile of ``module`` in a function of its own.

    Dynamo keeps its cache, its guards and its limit of recompilations on the code object: engines
    that shared one would slow each other down, and from the ninth on silently run eagerly.
    """

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return module(*inputs).float()

    own: Callable[..., torch.Tensor] = types.FunctionType(
        call.__code__.replace(), call.__globals__, "call", None, call.__closure__
    )
    compiled = torch.compile(own, dynamic=dynamic, options={"freezing": True})

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        # no_grad, not inference_mode: measured faster, and freezing needs no more than that.
        with torch.no_grad():
            if autocast:
                with torch.autocast("cpu", torch.bfloat16):
                    return compiled(*inputs)
            return compiled(*inputs)

    return forward

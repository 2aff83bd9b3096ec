"""fastrec's own kernels: the whole model as one native call, in parts, or within torch's forward.

The native call (:mod:`fastrec.runtime.native.engine`) needs neither Python nor torch. A model that
is no one plan runs in parts (:mod:`fastrec.runtime.native.parts`) or op by op, and ``describe()``
names the ops concerned. Both ways are timed, and so are torch's share of the threads and its
attention where torch takes part. For models in 16 bits see :mod:`fastrec.runtime.native.bf16`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastrec
from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError
from fastrec.exporters.flat import Flat
from fastrec.exporters.model_spec import quantised_module
from fastrec.exporters.trace import evaluated, owned
from fastrec.kernels._compiled import reason_missing
from fastrec.measure.choice import choice, fastest
from fastrec.measure.timing import Tolerance
from fastrec.models.attention import Attention, CrossAttention
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.runtime.backends._torch import (
    SPIN_S,
    Forward,
    TorchEngine,
    inference,
    reason_no_torch,
    torch_versions,
)
from fastrec.runtime.engine import PARTS, PLAN, BuildOptions, Engine
from fastrec.runtime.native.bf16 import multiply_bf16, precision_of, widened
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.lower import lower, program_spec
from fastrec.runtime.native.parts import Parts, PartsEngine
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.threads import with_torch_threads
from fastrec.spec import InputSpec

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
# A float's last bit may turn a rounding of an int8 layer.
_SAME_INT8 = Tolerance(noise=0.1)


def can_run() -> str | None:
    """None, or the reason why the native backend cannot run here."""
    return reason_no_torch()


def versions() -> dict[str, str]:
    """Versions of fastrec and torch, and the instruction set of the kernels."""
    isa = "none" if reason_missing() else kernels.active_isa()
    return {"fastrec": fastrec.__version__, "isa": isa, **torch_versions()}


def build(
    model: nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Compile the model.

    Args:
        model: as it is: float, 16 bits or quantised.
        example_inputs: as the options' spec says.
        options: settings are ``executor`` (``plan``: one native call; ``parts``: several, torch in
            between; ``torch``: op by op; by default the fastest), ``torch_threads`` and
            ``max_batch`` (larger batches are refused; by default there is no limit).

    Raises:
        ArgumentError: an unknown or bad setting.
        BackendError: the executor or the precision asked for cannot run this model.
    """
    options.allow("executor", "torch_threads", "max_batch")
    largest = _largest_batch(options)
    executor = options.setting("executor", ("plan", "parts", "torch"))
    precision = _precision(model, options.precision)
    plan, refusal, parts, no_parts = None, None, None, None
    if executor in ("auto", "plan"):
        plan, refusal = _planned(model, example_inputs, options, largest)
    if executor == "parts" or (executor == "auto" and plan is None):
        parts, no_parts = _in_parts(model, example_inputs, options, precision)
    if executor == "plan" and plan is None:
        raise BackendError(str(refusal))
    if executor == "parts" and parts is None:
        raise BackendError(str(no_parts))
    shares = sorted({1, options.threads})
    if "torch_threads" in options.settings:
        shares = [int(options.settings["torch_threads"])]
    plain = evaluated(model)
    models = {"torch attention": plain}
    has_attention = any(isinstance(module, Attention) for module in model.modules())
    if has_attention and not reason_missing():
        models = {"padded_attention": evaluated(model, fused=True), **models}
    forwards = {
        name: _with_kernel_threads(inference(m), options.threads) for name, m in models.items()
    }

    def at(forward: Forward, threads: int) -> Callable[..., Any]:
        return lambda *inputs: with_torch_threads(threads, forward, *inputs)

    names = {f"{name}, torch_threads={n}": (name, n) for name in models for n in shares}
    calls = {label: at(forwards[name], n) for label, (name, n) in names.items()}
    if plan is not None:
        calls = {PLAN: plan} if executor == "plan" else {PLAN: plan, **calls}
    if parts is not None:
        calls = {PARTS: parts} if executor == "parts" else {PARTS: parts, **calls}
    best, rows = fastest(calls, example_inputs, settle_s=SPIN_S)
    if refusal is not None:
        rows.append(choice(PLAN, False, None, str(refusal)))
    if no_parts is not None:
        rows.append(choice(PARTS, False, None, str(no_parts)))
    if best == PLAN:
        assert plan is not None
        plan._rows = [*plan.profile(example_inputs), *rows, *plan._rows]
        return plan
    about: dict[str, Any] = {
        "backend": "native",
        "precision": precision,
        "threads": options.threads,
        "spec": _up_to(options.spec, largest),
        "versions": versions(),
    }
    if best == PARTS:
        assert parts is not None
        return PartsEngine(parts, rows=[*parts.rows(), *rows], **about)
    if parts is not None:
        rows += parts.torch_rows()
        parts.close()
    attention, torch_threads = names[best]
    rows = [*_module_rows(models[attention], example_inputs), *rows]
    forward = _with_kernel_threads(inference(owned(models[attention])), options.threads)
    return TorchEngine(forward, torch_threads=torch_threads, rows=rows, **about)


def _precision(model: nn.Module, wanted: str | None) -> str:
    """The model's precision.

    Raises:
        BackendError: another precision is asked for.
    """
    quantised = quantised_module(model)
    if quantised is not None:
        own, is_so = "int8", f"{quantised} is int8"
    else:
        own = precision_of(model) or "fp32"
        is_so = f"this one is {own}"
    if wanted in (None, own):
        return own
    if wanted == "int8":
        raise BackendError(
            "native runs a model as it is, and this one holds no int8 module: call "
            "fastrec.quantize_(model, fastrec.Int8(), calibration=...) first"
        )
    remedy = {
        "bf16": ": model.to(torch.bfloat16) makes it so",
        "fp16": ": model.half() makes it so",
    }
    raise BackendError(f"native runs a model as it is, and {is_so}{remedy.get(str(wanted), '')}")


def _largest_batch(options: BuildOptions) -> int | None:
    limit = options.settings.get("max_batch")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ArgumentError("settings['max_batch']", "a positive integer or None", limit)
    return limit


def _up_to(spec: InputSpec, batch: int | None) -> InputSpec:
    """The spec with a largest batch. (The export does not see it: it would specialise on it.)"""
    if batch is None or "B" not in spec.limits:
        return spec
    return InputSpec(spec.fields, {**spec.limits, "B": (spec.limits["B"][0], batch)})


def _planned(
    model: nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    options: BuildOptions,
    largest: int | None,
) -> tuple[PlanEngine | None, BackendError | None]:
    """The engine that runs the model in one native call, or the reason why there is none."""
    if (reason := reason_missing()) is not None:
        return None, BackendError(reason)
    precision = _precision(model, options.precision)
    try:
        program = lower(
            model if precision in ("fp32", "int8") else widened(model), example_inputs, options.spec
        )
    except BackendError as error:
        return None, error
    optimise(program)
    if precision == "bf16":
        multiply_bf16(program)
    refused = model.refused if isinstance(model, Flat) else ""
    fixed = "; ".join(dict.fromkeys(why for why in (refused, program.fixed) if why))
    engine = PlanEngine.build(
        program,
        backend="native",
        precision=precision,
        threads=options.threads,
        spec=_up_to(program_spec(options.spec, program, example_inputs), largest),
        rows=[choice("free sizes", False, None, fixed)] if fixed else [],
        versions=versions(),
    )
    return engine, None


def _in_parts(
    model: nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    options: BuildOptions,
    precision: str,
) -> tuple[Parts | None, BackendError | None]:
    """The model in parts, or the reason why there are none."""
    if (reason := reason_missing()) is not None:
        return None, BackendError(reason)
    try:
        parts = Parts(
            model if precision in ("fp32", "int8") else widened(model),
            example_inputs,
            options.spec,
            threads=options.threads,
            torch_threads=int(options.settings.get("torch_threads", options.threads)),
            tolerance=_SAME_INT8 if precision == "int8" else Tolerance.for_precision("fp32"),
        )
    except BackendError as error:
        return None, error
    return parts, None


def _with_kernel_threads(forward: Forward, threads: int) -> Forward:
    """The kernels' thread count around a call, in the calling thread only."""
    if reason_missing():
        return forward

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with kernels.call_threads(threads):
            return forward(*inputs)

    return call


def _module_rows(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[dict[str, Any]]:
    """One row per module that holds parameters: op, kernel, density, bytes and MACs of a call."""
    calls: dict[str, int] = {}
    attention_macs: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                return  # a recurrent layer's, or the like
            # Rows of a Linear's input: elements of the output over its last dimension.
            rows = output.numel() // max(output.shape[-1], 1)
            calls[name] = calls.get(name, 0) + rows

        return count

    def attention_counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Scores and context, padding included: 2 B Lq Lk d.
            memory = args[1] if isinstance(module, CrossAttention) else args[0]
            attention_macs[name] = 2 * output.numel() * memory.shape[1]

        return count

    attentions = {
        name: module for name, module in model.named_modules() if isinstance(module, Attention)
    }
    leaves = {
        name: module
        for name, module in model.named_modules()
        if not any(module.children())
        and (any(True for _ in module.parameters()) or any(True for _ in module.buffers()))
    }
    hooks = [module.register_forward_hook(counter(name)) for name, module in leaves.items()]
    hooks += [m.register_forward_hook(attention_counter(name)) for name, m in attentions.items()]
    try:
        inference(model)(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = [_row(name, module, calls.get(name, 0)) for name, module in leaves.items()]
    for name, attention in attentions.items():
        row = _blank(name, "padded_attention" if attention.fused else "attention")
        row["macs"] = attention_macs.get(name)
        if attention.fused:
            row["kernel"] = f"cpu/{_kernel_isa('padded_attention')}"
            row["why"] = "measured against torch's, see the choices; padding is skipped"
        else:
            row["why"] = reason_missing() or "measured against padded_attention, see the choices"
        rows.append(row)
    return rows


def _blank(name: str, op: str) -> dict[str, Any]:
    return {
        "module": name,
        "op": op,
        "kernel": "torch",
        "density": None,
        "bytes": 0,
        "macs": None,
        "why": "fastrec has no kernel of its own for this module",
    }


def _row(name: str, module: nn.Module, rows: int) -> dict[str, Any]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    row = _blank(name, type(module).__name__)
    row["bytes"] = sum(t.numel() * t.element_size() for t in tensors)
    reason = reason_missing()
    if isinstance(module, SparseInt8Linear):
        dense = rows * module.in_features * module.out_features
        row["op"] = "sparse_int8_linear"
        row["density"] = round(module.density, 4)
        row["macs"] = round(dense * module.density)
        row["kernel"] = "reference" if reason else f"cpu/{_kernel_isa('sparse_int8_linear')}"
        row["why"] = reason or "the newest instruction set this CPU has; zero groups are skipped"
    elif isinstance(module, Int8Embedding):
        row["op"] = "int8_embedding"
        row["kernel"] = "reference" if reason else f"cpu/{_kernel_isa('int8_embedding')}"
        row["why"] = reason or "gathers int8 rows and scales them to float32 in one pass"
    elif isinstance(module, nn.Linear):
        row["macs"] = rows * module.in_features * module.out_features
        row["density"] = 1.0
        row["why"] = "a float layer: quantise it to run it on sparse_int8_linear"
    return row


def _kernel_isa(op_id: str) -> str:
    isa: str = kernels.registry()[op_id].kernel_isa()
    return isa

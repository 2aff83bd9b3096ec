"""ONNX export of float models: standard operators only, checked against torch before it is done."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError, ArtifactError, BackendError, MissingDependencyError
from fastrec.models.attention import Attention
from fastrec.runtime.engine import missing, package_versions
from fastrec.runtime.measure import Tolerance, correctness_gate
from fastrec.runtime.model_spec import as_tensors, quantised_module, spec_of
from fastrec.runtime.spec import InputSpec

# The highest that both current runtimes read in full; LayerNormalization is one operator from 17.
OPSET = 18
STANDARD_DOMAINS = ("", "ai.onnx")
# protobuf's limit for one message, less room for the graph itself.
_LARGEST_BYTES = 2**31 - 2**24


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any],
    *,
    dynamic_batch: bool = True,
) -> Path:
    """Write a float model as ONNX (opset 18), checked against torch through ONNX Runtime.

    The file appears under ``path`` only once its operators are all standard ones and its outputs
    agree with torch's on random inputs (largest error 1e-4 of the largest output).

    Args:
        model: a torch model with one tensor output; left as it is.
        path: the file to write.
        example_inputs: one batch; every size but the batch is fixed to the example's.
        dynamic_batch: whether the batch size stays free.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        BackendError: an operator has no ONNX form, the model holds int8 modules (their QDQ export
            comes with a later version), or the export disagrees with torch.
    """
    tensors = as_tensors("example_inputs", example_inputs)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".onnx", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        write_onnx(model, draft, tensors, dynamic_batch=dynamic_batch)
        verify_onnx(draft, model, tensors, dynamic_batch=dynamic_batch)
        draft.chmod(0o644)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def write_onnx(
    model: nn.Module,
    path: Path,
    example_inputs: tuple[torch.Tensor, ...],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Export without the check; errors as :func:`export`."""
    for package in ("onnx", "onnxscript"):
        if missing(package):
            raise MissingDependencyError(package, "onnx", "ONNX export")
    if (module := quantised_module(model)) is not None:
        raise BackendError(
            f"{module} is quantised: QDQ export of int8 modules comes with a later version; export "
            "the float model"
        )
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    if size > _LARGEST_BYTES:
        raise BackendError(
            f"the model holds {size / 1e9:.1f} GB: ONNX external data, needed over 2 GB, comes "
            "with a later version"
        )
    import onnx

    spec = spec_of(model, example_inputs)
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1, max=2**16)
        shapes = tuple({0: batch} for _ in example_inputs)
        if len(example_inputs[0]) == 1:
            # torch.export takes a size of 1 for a constant.
            example_inputs = tuple(torch.cat((t, t)) for t in example_inputs)
    with quiet():
        try:
            program = torch.onnx.export(
                evaluated(model),
                example_inputs,
                None,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=list(spec.names),
                output_names=["scores"],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise BackendError(f"no ONNX form of this model: {first_line(error)}") from error
        assert program is not None
        proto = program.model_proto
    check_domains(proto)
    import fastrec

    onnx.helper.set_model_props(
        proto,
        {
            "producer": f"fastrec {fastrec.__version__}",
            "inputs": ", ".join(f"{f.name} {f.dtype} {list(f.dims)}" for f in spec.fields),
        },
    )
    onnx.save(proto, path)


def verify_onnx(
    path: str | Path,
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Check an ONNX file against the torch model: operators, and outputs on random inputs.

    Raises:
        ArtifactError: not a readable ONNX model.
        BackendError: a non-standard operator, or outputs that differ by more than 1e-4 of the
            largest.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    if missing("onnx"):
        raise MissingDependencyError("onnx", "onnx", "ONNX export")
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from fastrec.runtime.backends.onnxruntime import open_session

    try:
        proto = onnx.load(Path(path))
        onnx.checker.check_model(proto)
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ArtifactError(f"{path} is not a valid ONNX model: {first_line(error)}") from error
    check_domains(proto)
    session = open_session(path, threads=1)
    tensors = as_tensors("example_inputs", example_inputs)
    shapes = [tuple(t.shape) for t in tensors]
    spec = spec_of(model, tensors)
    fixed = spec.fixed_to(shapes, keep=("B",))
    evaluate = evaluated(model)
    for seed, batch in enumerate((1, 3) if dynamic_batch else (shapes[0][0],)):
        arrays = fixed.sample({"B": batch}, seed=seed, like=[t.numpy() for t in tensors])
        with torch.inference_mode():
            expected = evaluate(*[torch.from_numpy(a) for a in arrays]).numpy()
        got = session.run(None, dict(zip(spec.names, arrays, strict=True)))[0]
        correctness_gate(expected, got, Tolerance.for_precision("fp32")).require("the ONNX export")


def check_domains(proto: Any) -> None:
    """Raise BackendError unless every operator is of a standard domain and the opset is >= 17."""
    nodes = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    custom = sorted({f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in STANDARD_DOMAINS})
    if custom:
        raise BackendError(f"not standard ONNX operators: {', '.join(custom)}")
    opset = max((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), default=0)
    if opset < 17:
        raise BackendError(f"opset {opset} is below 17")


def evaluated(model: nn.Module, *, fused: bool = False) -> nn.Module:
    """The model in eval mode, its attention on our kernel (``fused``) or on torch.

    Itself where it is that already, else a copy that shares its tensors.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    ready = all(module.fused == fused for module in attentions)
    if ready and not any(module.training for module in model.modules()):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    copied: nn.Module = copy.deepcopy(model, memo={id(t): t for t in tensors}).eval()
    for module in copied.modules():
        if isinstance(module, Attention):
            module.fused = fused
    return copied


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter (deprecations, missing torchvision) away from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def first_line(error: BaseException) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def onnx_versions() -> dict[str, str]:
    """Versions of the packages an export depends on."""
    return package_versions("torch", "onnx", "onnxscript", "onnxruntime")


def static_shapes(spec: InputSpec, example_inputs: Sequence[torch.Tensor]) -> InputSpec:
    """The spec with every size but the batch fixed to the examples', as exported graphs have it."""
    shapes = [tuple(t.shape) for t in example_inputs]
    if len(shapes) != len(spec.fields):
        raise ArgumentError("example_inputs", f"{len(spec.fields)} inputs", len(shapes))
    return spec.fixed_to(shapes, keep=("B",))

"""ONNX export: standard operators only, int8 as QDQ, checked against torch before it is done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError, ArtifactError, BackendError, MissingDependencyError
from fastrec.exporters.model_spec import as_tensors, quantised_module, spec_of
from fastrec.exporters.onnx.custom_forms import CUSTOM_DECOMPOSITIONS, CustomLinear
from fastrec.exporters.onnx.custom_ops import DOMAIN, OPERATORS, uses_custom_ops
from fastrec.exporters.onnx.forms import DECOMPOSITIONS, QdqLinear, with_int8_forms
from fastrec.exporters.onnx.sharing import unshare_int8
from fastrec.exporters.onnx.storage import (
    external_data,
    join_files,
    make_sparse,
    set_aside,
    write_files,
)
from fastrec.exporters.trace import evaluated, first_line, quiet, traced
from fastrec.measure.packages import missing, package_versions
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.spec import InputSpec

# The highest that both current runtimes read in full; LayerNormalization is one operator from 17.
OPSET = 18
_INT8_ATTENTION = torch.ops.fastrec.window_sparse_attention_int8.default
STANDARD_DOMAINS = ("", "ai.onnx")


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any],
    *,
    dynamic_batch: bool = True,
    sparse: bool = False,
    custom_ops: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model as ONNX (opset 18), checked against torch through ONNX Runtime.

    The file appears under ``path`` only once its operators are all standard ones and its outputs
    agree with torch's on random inputs (fp32: largest error 1e-4 of the largest output; int8: a
    tenth of the spread of a request's scores, because a float's last bit may turn a rounding).

    ``SparseInt8Linear`` becomes QuantizeLinear, DequantizeLinear and MatMul with its own scales and
    per-channel int8 weights (dense; pruned groups are zeros), ``Int8Embedding`` a Gather of int8
    rows and of their scales, sparse attention slices and products in O(L * window).

    Args:
        model: a torch model with one tensor output; left as it is.
        path: the file to write.
        example_inputs: one batch like those to come.
        dynamic_batch: whether batch, history length and candidate count stay free (as far as the
            model's code allows it); else all sizes are the examples'.
        sparse: store float weights of which less than a third are not zero as sparse initialisers
            (a smaller file; runtimes widen them when they load it).
        custom_ops: write int8 layers and sparse attention as operators of
            :mod:`fastrec.exporters.onnx.custom_ops`, for ONNX Runtime alone: pruned groups are then
            neither stored nor multiplied. Checked through that library.
        metadata: name -> text, kept among the model's properties (a recipe, a data set's name),
            beside its producer, inputs with their meaning (``spec``, JSON) and free sizes.

    Returns:
        the path. Tensors of a model over 2 GB lie beside it, in ``<path>.data``.

    Raises:
        ArgumentError: ``metadata`` is not text, or names a property that the export writes.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        BackendError: the model cannot be traced, an operator has no ONNX form, the export disagrees
            with torch, or the library of custom ops was not built.
    """
    tensors = as_tensors("example_inputs", example_inputs)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: a model over 2 GB is two files, of which one names the other.
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    draft = folder / path.name
    free = None if dynamic_batch else ()
    try:
        write_onnx(
            model,
            draft,
            tensors,
            free=free,
            sparse=sparse,
            custom_ops=custom_ops,
            metadata=metadata,
            join=False,
        )
        # Runtimes map external data, and would hold one file's tensors twice while they read it.
        verify_onnx(draft, model, tensors, dynamic_batch=dynamic_batch)
        join_files(draft)
        draft.chmod(0o644)
        if external_data(draft).exists():
            os.replace(external_data(draft), external_data(path))
        os.replace(draft, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def write_onnx(
    model: nn.Module,
    path: Path,
    example_inputs: tuple[torch.Tensor, ...],
    *,
    free: Sequence[str] | None = None,
    sparse: bool = False,
    custom_ops: bool = False,
    metadata: Mapping[str, str] | None = None,
    join: bool = True,
) -> None:
    """Export without the check; arguments and errors as :func:`export`.

    ``free`` names the sizes that stay free, of B, L and m; None means all that the model's export
    allows. Without ``join`` the large tensors are left in a file beside it.
    """
    for package in ("onnx", "onnxscript"):
        if missing(package):
            raise MissingDependencyError(package, "onnx", "ONNX export")
    import onnx

    spec = spec_of(model, example_inputs)
    if free is not None:
        spec = spec.fixed_to([tuple(t.shape) for t in example_inputs], keep=tuple(free))
    form = CustomLinear if custom_ops else QdqLinear
    graph, symbols = traced(with_int8_forms(evaluated(model), form), example_inputs, spec)
    if any(n.target is _INT8_ATTENTION for n in graph.graph.nodes):
        raise BackendError(
            "attention in 8-bit integers has no ONNX form; quantise with Int8(attention=False)"
        )
    decompositions = {**DECOMPOSITIONS, **(CUSTOM_DECOMPOSITIONS if custom_ops else {})}
    with quiet():
        try:
            program = torch.onnx.export(
                graph.run_decompositions(decompositions),
                (),
                None,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(spec.names),
                output_names=["scores"],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise BackendError(f"no ONNX form of this model: {first_line(error)}") from error
        assert program is not None
        values = set_aside(program.model)
        proto = program.model_proto
    check_domains(proto, custom_ops=custom_ops)
    _name_sizes(proto, spec)
    unshare_int8(proto)
    if sparse:
        make_sparse(proto, values)
    import fastrec

    properties = {
        "producer": f"fastrec {fastrec.__version__}",
        "inputs": ", ".join(f"{f.name} {f.dtype} {list(f.dims)}" for f in spec.fields),
        "spec": json.dumps(spec.to_dict()),
        "free sizes": ", ".join(symbols),
    }
    for name, text in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(text, str) or name in properties:
            expected = f"text under other names than {', '.join(properties)}"
            raise ArgumentError("metadata", expected, f"{name!r}: {type(text).__name__}")
    onnx.helper.set_model_props(proto, {**properties, **(metadata or {})})
    write_files(proto, values, path)
    if join:
        join_files(path)


def _name_sizes(proto: Any, spec: InputSpec) -> None:
    """Give free sizes the names they have in the spec, instead of torch.export's."""
    names: dict[str, str] = {}
    for value, field in zip(proto.graph.input, spec.fields, strict=True):
        for dim, name in zip(value.type.tensor_type.shape.dim, field.dims, strict=True):
            if dim.dim_param:
                names[dim.dim_param] = str(name)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


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
    from google.protobuf.message import DecodeError

    from fastrec.exporters.onnx.session import SessionSettings, open_session

    try:
        # By its path: a model over 2 GB does not fit one message.
        onnx.checker.check_model(str(path))
        proto = onnx.load(Path(path), load_external_data=False)
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ArtifactError(f"{path} is not a valid ONNX model: {first_line(error)}") from error
    custom_ops = uses_custom_ops(proto.graph.node)
    check_domains(proto, custom_ops=custom_ops)
    session = open_session(path, threads=1, settings=SessionSettings(custom_ops=custom_ops))
    tensors = as_tensors("example_inputs", example_inputs)
    spec = spec_of(model, tensors)
    given = spec.sizes([tuple(t.shape) for t in tensors])
    evaluate = evaluated(model)
    quantised = quantised_module(model) is not None
    tolerance = Tolerance(noise=0.1) if quantised else Tolerance.for_precision("fp32")
    for seed, sizes in enumerate(_trials(session, given) if dynamic_batch else (given,)):
        arrays = spec.sample(sizes, seed=seed, like=[t.numpy() for t in tensors])
        with torch.inference_mode():
            expected = evaluate(*[torch.from_numpy(a) for a in arrays]).numpy()
        got = session.run(None, dict(zip(spec.names, arrays, strict=True)))[0]
        correctness_gate(expected, got, tolerance).require("the ONNX export")


def _trials(session: Any, given: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try: the examples', another batch, and smaller ones of all that the file leaves
    free."""
    free = {size for value in session.get_inputs() for size in value.shape}
    smaller = {name: max(1, size // 2) for name, size in given.items() if name in free}
    return [given | {"B": 1}, given | {"B": 3}, given | smaller | {"B": 2}]


def check_domains(proto: Any, *, custom_ops: bool = False) -> None:
    """Raise BackendError unless every operator is of a standard domain, or one of ours where
    ``custom_ops`` is, and the opset is >= 17."""
    nodes = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    ours = {(DOMAIN, name) for name in OPERATORS} if custom_ops else set()
    custom = sorted(
        f"{domain}::{kind}"
        for domain, kind in {(n.domain, n.op_type) for n in nodes} - ours
        if domain not in STANDARD_DOMAINS
    )
    if custom:
        raise BackendError(f"not standard ONNX operators: {', '.join(custom)}")
    opset = max((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), default=0)
    if opset < 17:
        raise BackendError(f"opset {opset} is below 17")


def onnx_versions() -> dict[str, str]:
    """Versions of the packages an export depends on."""
    return package_versions("torch", "onnx", "onnxscript", "onnxruntime")


def static_shapes(
    spec: InputSpec, example_inputs: Sequence[torch.Tensor], free_sizes: str = "batch"
) -> InputSpec:
    """The spec with every size but the batch fixed to the examples', as exported graphs have it;
    all of it where ``free_sizes`` is "all"."""
    if free_sizes == "all":
        return spec
    shapes = [tuple(t.shape) for t in example_inputs]
    if len(shapes) != len(spec.fields):
        raise ArgumentError("example_inputs", f"{len(spec.fields)} inputs", len(shapes))
    return spec.fixed_to(shapes, keep=("B",))

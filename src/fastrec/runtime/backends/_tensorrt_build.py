"""From an ONNX file to a TensorRT plan: network, optimisation profile, timing cache, plan cache.

TensorRT 11 knows strongly typed networks alone: precision is what the ONNX file says (float16
constants, QuantizeLinear and DequantizeLinear), and the flags that once asked for FP16 or INT8 are
gone. A plan belongs to one GPU model and one TensorRT version, and so do timings of its kernels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrec import env
from fastrec.errors import ArgumentError, BackendError
from fastrec.runtime.cache import digest, read_checked, write_checked
from fastrec.spec import InputSpec

# (smallest, usual, largest) of each size that stays free.
Profile = dict[str, tuple[int, int, int]]
# A batch that grows to this without being asked for.
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class BuildSettings:
    """The settings that a plan depends on besides the ONNX file and the GPU.

    Args:
        profile: of the free sizes.
        tf32: whether float32 products may be taken from TF32 units (10 bits of mantissa).
        sparse_weights: whether kernels for 2:4 sparse weights may be chosen, where weights have
            that pattern.
        workspace_mb: memory that kernels may use while they run, in MiB.
        level: TensorRT's builder_optimization_level, 0 (fast build) to 5.
    """

    profile: Profile
    tf32: bool = False
    sparse_weights: bool = False
    workspace_mb: int = 1024
    level: int = 3

    def key(self, onnx_file: bytes, gpu: Mapping[str, Any], version: str) -> str:
        """The key of the plan in the cache: hex, the same for the same file, settings, GPU and
        version."""
        file = hashlib.sha256(onnx_file).hexdigest()
        return digest([file, dataclasses.asdict(self), dict(gpu), version])


def profile_for(
    spec: InputSpec, shapes: Sequence[Sequence[int]], wanted: Mapping[str, Any] | None
) -> Profile:
    """The range of each free size: those in ``wanted``, else from its lower limit, best at the
    example's, to its upper limit or, without one, the example's size (a batch: at least 64).

    Raises:
        ArgumentError: an unknown size, or not three ascending positive integers.
    """
    sizes = spec.sizes(shapes)
    profile: Profile = {}
    for name, size in sizes.items():
        low, high = spec.limits.get(name, (1, None))
        most = max(size, _LARGEST_BATCH) if name == "B" else size
        profile[name] = (max(low, 1), size, most if high is None else high)
    for name, given in (wanted or {}).items():
        if name not in sizes:
            raise ArgumentError("settings['profile']", f"sizes among {sorted(sizes)}", name)
        if (
            not isinstance(given, tuple | list)
            or len(given) != 3
            or any(type(n) is not int or n < 1 for n in given)
            or list(given) != sorted(given)
        ):
            expected = "(smallest, usual, largest), ascending positive integers"
            raise ArgumentError(f"settings['profile'][{name!r}]", expected, given)
        profile[name] = tuple(given)
    return profile


def within(spec: InputSpec, profile: Profile) -> InputSpec:
    """The spec with the profile's ranges as its limits, so that other shapes are refused."""
    limits = {name: (low, high) for name, (low, _, high) in profile.items()}
    return InputSpec(spec.fields, {**spec.limits, **limits})


class Log:
    """TensorRT's messages while it works: warnings and errors, the last of them for a message."""

    def __init__(self, trt: Any) -> None:
        kept = self.lines = [""]

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if int(severity) <= int(trt.ILogger.Severity.ERROR):
                    kept.append(msg.strip())

        self.logger = Logger()

    @property
    def last(self) -> str:
        """The last error, or that there was none."""
        return self.lines[-1] or "TensorRT gave no reason"


def plan_for(
    trt: Any,
    onnx_file: bytes,
    spec: InputSpec,
    settings: BuildSettings,
    gpu: Mapping[str, Any],
) -> tuple[bytes, str]:
    """A serialised engine, from the cache where it is there and whole, and where it came from.

    Raises:
        BackendError: TensorRT cannot parse the file or build the engine; its own words.
    """
    key = settings.key(onnx_file, gpu, str(trt.__version__))
    cached = _folder() / f"{key}.plan"
    plan = read_checked(cached)
    if plan is not None:
        return plan, "plan of this GPU and TensorRT, from the cache"
    plan, timings = build_plan(trt, onnx_file, spec, settings, _timing_file(gpu, trt))
    write_checked(cached, plan)
    return plan, f"built here; {timings}"


def build_plan(
    trt: Any, onnx_file: bytes, spec: InputSpec, settings: BuildSettings, timing_file: Path
) -> tuple[bytes, str]:
    """Parse, set the profile, build; the plan, and what came of the timing cache.

    Raises:
        BackendError: as :func:`plan_for`.
    """
    log = Log(trt)
    builder = trt.Builder(log.logger)
    # The default since TensorRT 11; 10 must be told.
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(onnx_file):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{e.node_name()}: {e.desc()}" for e in errors) or log.last
        raise BackendError(f"TensorRT cannot read the model: {said}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb << 20)
    config.builder_optimization_level = settings.level
    if settings.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default
    if settings.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    profile = builder.create_optimization_profile()
    fields = {f.name: f for f in spec.fields}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        dims = fields[tensor.name].dims
        if -1 in tuple(tensor.shape):
            shapes = [
                tuple(d if isinstance(d, int) else settings.profile[d][place] for d in dims)
                for place in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(f"TensorRT refuses the profile {settings.profile}: {log.last}")
    said = _use_timings(config, timing_file)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT cannot build the engine: {log.last}")
    if (timings := config.get_timing_cache()) is not None:
        write_checked(timing_file, bytes(timings.serialize()))
    return bytes(plan), said


def _use_timings(config: Any, file: Path) -> str:
    """Give the builder the timings of earlier builds, or an empty cache to fill."""
    known = read_checked(file)
    for data, said in ((known, "timings of earlier builds used"), (b"", "timings measured anew")):
        if data is not None and config.set_timing_cache(config.create_timing_cache(data), False):
            return said
    return "no timing cache"


def _folder() -> Path:
    return env.cache_dir() / "tensorrt"


def _timing_file(gpu: Mapping[str, Any], trt: Any) -> Path:
    return _folder() / f"timings-{digest([dict(gpu), str(trt.__version__)])}.cache"


def two_four_weights(proto: Any) -> tuple[int, int]:
    """(weights [K, N] with at most two of each four values along K nonzero, weights): what kernels
    for 2:4 sparsity can run of a model's products, of what they multiply with."""
    import onnx

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    weights: dict[str, int] = {}  # name -> the axis of K
    for node in proto.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        name, axis = node.input[1], 0
        if any(a.name == "transB" and a.i for a in node.attribute):
            axis = 1
        while name in makers and makers[name].op_type in ("DequantizeLinear", "Transpose"):
            axis ^= makers[name].op_type == "Transpose"
            name = makers[name].input[0]
        if name in constants and len(constants[name].dims) == 2:
            weights[name] = axis
    found = 0
    for name, axis in weights.items():
        weight = np.moveaxis(onnx.numpy_helper.to_array(constants[name]), axis, 0)
        if len(weight) % 4 == 0:
            nonzero = (weight != 0).reshape(-1, 4, weight.shape[1]).sum(axis=1)
            found += bool((nonzero <= 2).all())
    return found, len(weights)


def to_float16(proto: Any) -> Any:
    """The model in float16, its float inputs and outputs still float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(proto, keep_io_types=True)


def shape_of(context: Any, name: str) -> tuple[int, ...]:
    """A tensor's shape in an execution context whose input shapes are set."""
    return tuple(int(d) for d in context.get_tensor_shape(name))


def numpy_dtype(trt: Any, dtype: Any) -> np.dtype:
    """TensorRT's dtype as numpy's.

    Raises:
        BackendError: numpy has none.
    """
    known = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.INT8: "int8",
        trt.DataType.UINT8: "uint8",
        trt.DataType.BOOL: "bool",
    }
    if dtype not in known:
        raise BackendError(f"TensorRT tensors of {dtype} have no dtype in numpy")
    return np.dtype(known[dtype])

"""Stand-ins for the parts of ``tensorrt`` and CuPy that the backend calls, computing on the CPU.

Every public attribute here stands in ``tensorrt_surface.txt``, which was read from the real
package, with the same arguments (``test_tensorrt.py`` compares them); instances take no others. A
"plan" is the ONNX file with its profile, and ONNX Runtime runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import io
import json
import zipfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

__version__ = "11.4.0.106"
PLAN = "a stand-in's plan"
built: list[IBuilderConfig] = []
"""The configurations of all builds, for tests to look at."""


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0


class BuilderFlag(enum.IntEnum):
    TF32 = 6
    SPARSE_WEIGHTS = 7


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8


_DTYPES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.INT64: DataType.INT64,
}


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(d.dim_value if not d.dim_param else -1 for d in value.type.tensor_type.shape.dim)


class ITensor:
    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def name(self) -> str:
        return str(self._value.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self._value)


class INetworkDefinition:
    __slots__ = ("_flags", "_model")

    def __init__(self, flags: int) -> None:
        self._flags, self._model = flags, None

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._model.graph.input[index])


class ParserError:
    __slots__ = ("_node", "_text")

    def __init__(self, node: str, text: str) -> None:
        self._node, self._text = node, text

    def node_name(self) -> str:
        return self._node

    def desc(self) -> str:
        return self._text


class OnnxParser:
    """Refuses what TensorRT refuses: quantised tensors that are not symmetric int8."""

    __slots__ = ("_errors", "_network")

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert network._flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self._network, self._errors = network, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        proto = onnx.load_from_string(model)
        constants = {t.name: t for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
                continue
            zero = onnx.numpy_helper.to_array(constants[node.input[2]])
            if zero.dtype != np.int8 or zero.any():
                self._errors.append(ParserError(node.name, f"zero point {zero} of {zero.dtype}"))
        self._network._model = proto
        return not self._errors


class IOptimizationProfile:
    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(
        self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]
    ) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._ranges[input] = [tuple(min), tuple(opt), tuple(max)]


class IHostMemory(bytes):
    pass


class ITimingCache:
    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data + b"timed ")


class IBuilderConfig:
    __slots__ = ("_flags", "_limits", "_profiles", "_timings", "builder_optimization_level")

    def __init__(self) -> None:
        self._flags, self._limits, self._profiles = {BuilderFlag.TF32}, {}, []
        self._timings: ITimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._data and not cache._data.startswith(b"timed "):
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timings


class Builder:
    __slots__ = ("_logger",)

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        built.append(config)
        if config.builder_optimization_level == 5:  # how a test asks for a failure
            self._logger.log(ILogger.Severity.ERROR, "no kernel fits level 5")
            return None
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as folder:
            folder.comment = PLAN.encode()
            folder.writestr("model.onnx", network._model.SerializeToString())
            folder.writestr("profile.json", json.dumps(config._profiles[0]._ranges))
        return IHostMemory(target.getvalue())


class IExecutionContext:
    __slots__ = ("_addresses", "_engine", "_shapes")

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        self._shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """The one output is as wide as the candidates."""
        return self._shapes.get(name) or self._shapes[self._engine._widest]

    def execute_async_v3(self, stream_handle: int) -> bool:
        work = self._engine._work(dict(self._shapes), dict(self._addresses))
        Stream.of[stream_handle].enqueue(work)
        return True


class ICudaEngine:
    __slots__ = ("_model", "_profile", "_session", "_widest")

    def __init__(self, model: Any, profile: dict[str, Any]) -> None:
        self._model, self._profile = model, profile
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Nodes run as they are written. Fused int8 products of CPUs without VNNI saturate in int16,
        # which TensorRT's do not.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in model.graph.input]
        self._widest = "cand_item" if "cand_item" in names else names[0]

    @property
    def num_io_tensors(self) -> int:
        return len(self._model.graph.input) + 1

    def _values(self) -> list[Any]:
        return [*self._model.graph.output, *self._model.graph.input]

    def get_tensor_name(self, index: int) -> str:
        return str(self._values()[index].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_output = name == self._model.graph.output[0].name
        return TensorIOMode.OUTPUT if is_output else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        value = next(v for v in self._values() if v.name == name)
        return _DTYPES[value.type.tensor_type.elem_type]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        value = next(v for v in self._values() if v.name == name)
        return [tuple(s) for s in self._profile.get(name, [_shape(value)] * 3)]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def _work(self, shapes: dict[str, Any], addresses: dict[str, int]) -> Any:
        dtypes = {DataType.INT64: np.int64, DataType.FLOAT: np.float32}

        def at(name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(dtypes[self.get_tensor_dtype(name)])
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_char * size).from_address(addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

        def run() -> None:
            feed = {v.name: at(v.name, shapes[v.name]).copy() for v in self._model.graph.input}
            scores = self._session.run(None, feed)[0]
            at(self._model.graph.output[0].name, scores.shape)[...] = scores

        return run


class Runtime:
    __slots__ = ("_logger",)

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            with zipfile.ZipFile(io.BytesIO(serialized_engine)) as folder:
                assert folder.comment == PLAN.encode()
                model = onnx.load_from_string(folder.read("model.onnx"))
                return ICudaEngine(model, json.loads(folder.read("profile.json")))
        except zipfile.BadZipFile:
            self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None


class CUDARuntimeError(RuntimeError):
    pass


class Graph:
    def __init__(self, work: list[Any]) -> None:
        self._work = work

    def launch(self, stream: Stream) -> None:
        for step in self._work:
            stream.enqueue(step)


class Stream:
    """Work is done in order, at ``synchronize`` at the latest; while captured, at launches."""

    of: dict[int, Stream] = {}  # noqa: RUF012 - one registry, as the driver has

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        assert non_blocking
        self.ptr = len(Stream.of) + 1
        Stream.of[self.ptr] = self
        self._queue: list[Any] = []
        self._capture: list[Any] | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def enqueue(self, step: Any) -> None:
        (self._queue if self._capture is None else self._capture).append(step)

    def begin_capture(self) -> None:
        assert not self._queue, "work before a capture has to be waited for"
        self._capture = []

    def end_capture(self) -> Graph:
        work, self._capture = self._capture, None
        assert work is not None
        graphs.append(work)
        return Graph(work)

    def is_capturing(self) -> bool:
        return self._capture is not None

    def synchronize(self) -> None:
        for step in self._queue:
            step()
        self._queue = []


graphs: list[Any] = []


class _Memory:
    def __init__(self, size: int) -> None:
        self._bytes = (ctypes.c_char * size)()
        ctypes.memset(self._bytes, 0xFF, size)
        self.ptr = ctypes.addressof(self._bytes)


def _memcpy(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    Stream.of[stream].enqueue(lambda: ctypes.memmove(dst, src, size))


class Gpu:
    """What the stand-in's GPU says of itself; a test may change it."""

    count = 1
    name = "Stand-in GPU"
    major, minor = 9, 0


def _count() -> int:
    if Gpu.count < 0:
        raise CUDARuntimeError("cudaErrorInsufficientDriver")
    return Gpu.count


def _module(name: str) -> ModuleType:
    """An empty module that ``importlib.util.find_spec`` finds."""
    return module_from_spec(ModuleSpec(name, None, origin=f"/stand-in/{name}.py"))


def cupy_modules() -> dict[str, ModuleType]:
    """cupy, cupy.cuda and cupy.cuda.runtime, for sys.modules."""
    cupy, cuda, runtime = map(_module, ("cupy", "cupy.cuda", "cupy.cuda.runtime"))
    cupy.cuda, cuda.runtime = cuda, runtime  # type: ignore[attr-defined]
    for name, value in {
        "alloc": _Memory,
        "alloc_pinned_memory": lambda size: (ctypes.c_char * size)(),
        "Stream": Stream,
    }.items():
        setattr(cuda, name, value)
    for name, thing in {
        "CUDARuntimeError": CUDARuntimeError,
        "getDeviceCount": _count,
        "getDevice": lambda: 0,
        "getDeviceProperties": lambda _: {
            "name": Gpu.name.encode(),
            "major": Gpu.major,
            "minor": Gpu.minor,
        },
        "memcpyAsync": _memcpy,
        "memcpyHostToDevice": 1,
        "memcpyDeviceToHost": 2,
    }.items():
        setattr(runtime, name, thing)
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime}


TENSORRT = (
    ILogger,
    NetworkDefinitionCreationFlag,
    BuilderFlag,
    MemoryPoolType,
    TensorIOMode,
    DataType,
    ITensor,
    INetworkDefinition,
    ParserError,
    OnnxParser,
    IOptimizationProfile,
    IHostMemory,
    ITimingCache,
    IBuilderConfig,
    Builder,
    IExecutionContext,
    ICudaEngine,
    Runtime,
)


def tensorrt_module() -> ModuleType:
    """tensorrt, for sys.modules."""
    module = _module("tensorrt")
    module.__version__ = __version__  # type: ignore[attr-defined]
    for kind in TENSORRT:
        setattr(module, kind.__name__, kind)
    return module


@contextlib.contextmanager
def another_gpu(name: str) -> Any:
    """The same machine with another GPU."""
    before, Gpu.name = Gpu.name, name
    try:
        yield
    finally:
        Gpu.name = before

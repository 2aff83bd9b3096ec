"""TensorRT on an NVIDIA GPU: fp32, fp16, and what ``fastrec.quantize_`` made as explicit int8.

The ONNX export is parsed as a strongly typed network; uint8 activations are written as symmetric
int8 first, which TensorRT needs (``fastrec.exporters.onnx.symmetric``). It has never been run on a
GPU by its authors: its steps are tested against a stand-in with the signatures of the real package.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec.errors import ArgumentError, ArtifactError, BackendError, not_installed
from fastrec.measure.choice import choice
from fastrec.measure.packages import missing, package_versions
from fastrec.runtime import artifact
from fastrec.runtime.backends import _tensorrt_build as builder
from fastrec.runtime.backends import _tensorrt_device as device
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.spec import InputSpec

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "int8")
OLDEST = 10
_PLAN = "model.plan"
# Shapes whose contexts and graphs are kept; each holds the activations of one call.
_SHAPES = 16


def can_run() -> str | None:
    """None, or why not."""
    if missing("tensorrt"):
        return not_installed("tensorrt", "tensorrt")
    try:
        trt = _tensorrt()
    except (ImportError, OSError) as error:
        return f"tensorrt cannot be imported: {error}"
    if int(str(trt.__version__).split(".")[0]) < OLDEST:
        return f"tensorrt {trt.__version__} is too old: this needs {OLDEST} or newer"
    return device.reason_missing()


def versions() -> dict[str, str]:
    """Versions of the packages that a build uses, and the GPU's name."""
    found = package_versions("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "cupy-cuda13x", "onnx")
    return found | ({} if can_run() is not None else {"gpu": device.gpu()["name"]})


def _tensorrt() -> Any:
    import tensorrt

    return tensorrt


class _Shape:
    """An execution context for inputs of one shape, and the graph of a whole call.

    A graph holds the state of the context that it was captured from, so each shape has its own.
    """

    def __init__(self, engine: TensorRtEngine, shapes: tuple[tuple[int, ...], ...]) -> None:
        self._engine = engine
        self._context = engine._cuda_engine.create_execution_context()
        if self._context is None:
            raise BackendError("TensorRT has no memory for another execution context")
        for (name, buffer), shape in zip(engine._inputs.items(), shapes, strict=True):
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"TensorRT refuses shape {list(shape)} of {name}")
            self._context.set_tensor_address(name, buffer.address)
        self._context.set_tensor_address(engine._output, engine._scores.address)
        self._items = [int(np.prod(shape)) for shape in shapes]
        self.output = builder.shape_of(self._context, engine._output)
        self._output_items = int(np.prod(self.output))
        self._graph: Any = None
        self.why_no_graph: str | None = None
        # TensorRT does what it put off in the first call, which no graph could hold.
        self._enqueue()
        engine._stream.synchronize()
        if engine._use_graph:
            try:
                self._graph = device.captured(engine._stream, self._enqueue)
            except RuntimeError as error:
                self.why_no_graph = str(error)

    def _enqueue(self) -> None:
        """Copies in, inference, copy out, on the engine's stream."""
        engine = self._engine
        for buffer, items in zip(engine._inputs.values(), self._items, strict=True):
            buffer.upload(items, engine._stream)
        if not self._context.execute_async_v3(engine._stream.ptr):
            raise BackendError(f"TensorRT could not run the model: {engine._log.last}")
        engine._scores.download(self._output_items, engine._stream)

    def run(self) -> None:
        """One call; returns when the scores are on the host."""
        stream = self._engine._stream
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(stream)
        stream.synchronize()


class TensorRtEngine(Engine):
    """A plan with one set of buffers: calls from several threads take turns."""

    spin_s = 0.0

    def __init__(
        self, plan: bytes, *, gpu: dict[str, str], cuda_graph: bool = True, **about: Any
    ) -> None:
        super().__init__(**about)
        trt = _tensorrt()
        self._plan, self._gpu, self._use_graph = plan, gpu, cuda_graph
        self._log = builder.Log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        self._cuda_engine = self._runtime.deserialize_cuda_engine(plan)
        if self._cuda_engine is None:
            raise ArtifactError(f"TensorRT cannot read this plan: {self._log.last}")
        self._lock = threading.Lock()
        self._stream = device.new_stream()
        self._shapes: OrderedDict[tuple[tuple[int, ...], ...], _Shape] = OrderedDict()
        engine, names = self._cuda_engine, []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                names.append(name)
            else:
                self._output = name
        if sorted(names) != sorted(self.spec.names):
            raise ArtifactError(f"the plan's inputs are {names}, expected {list(self.spec.names)}")
        largest = {n: tuple(engine.get_tensor_profile_shape(n, 0)[2]) for n in self.spec.names}
        context = engine.create_execution_context()
        for name, shape in largest.items():
            context.set_input_shape(name, shape)
        scores = int(np.prod(builder.shape_of(context, self._output)))
        self._inputs = {
            name: device.Buffer(int(np.prod(shape)), self._dtype(trt, name))
            for name, shape in largest.items()
        }
        self._scores = device.Buffer(scores, self._dtype(trt, self._output))

    def _dtype(self, trt: Any, name: str) -> np.dtype:
        return builder.numpy_dtype(trt, self._cuda_engine.get_tensor_dtype(name))

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        shapes = tuple([a.shape for a in arrays])
        with self._lock:
            self._require_open()
            for array, buffer in zip(arrays, self._inputs.values(), strict=True):
                buffer.host[: array.size] = array.reshape(-1)
            kept = self._shapes.get(shapes)
            if kept is None:
                kept = self._prepared(shapes)
            self._shapes.move_to_end(shapes)
            kept.run()
            scores = self._scores.host[: int(np.prod(kept.output))].reshape(kept.output)
            return scores.astype(np.float32)

    def _prepared(self, shapes: tuple[tuple[int, ...], ...]) -> _Shape:
        new = _Shape(self, shapes)
        if new.why_no_graph is not None:
            why = f"the call cannot be captured: {new.why_no_graph}"
            self._rows.append(choice(f"CUDA graph, {list(shapes[0])}", False, None, why))
        self._shapes[shapes] = new
        if len(self._shapes) > _SHAPES:
            self._shapes.popitem(last=False)
        return new

    def save(self, path: str | Path) -> Path:
        """Write the plan with the GPU and version that it belongs to."""
        header = self._header()
        header["settings"] = {
            "gpu": self._gpu,
            "tensorrt": str(_tensorrt().__version__),
            "cuda_graph": self._use_graph,
        }

        def fill(folder: Path) -> None:
            (folder / _PLAN).write_bytes(self._plan)

        return artifact.write(path, header, fill)

    def close(self) -> None:
        """Free the contexts, the engine and the buffers."""
        with self._lock:
            super().close()
            self._shapes.clear()
            self._cuda_engine = self._runtime = None
            self._inputs = {}


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Export, write int8 symmetric or floats as float16, build or take the plan from the cache.

    Settings: ``profile`` ({"B": (smallest, usual, largest), ...}), ``tf32`` (False), ``workspace``
    (1024, MiB), ``level`` (3), ``sparse_weights`` ("auto": where all weights have the 2:4 pattern;
    "on", "off"), ``cuda_graph`` ("on", "off").
    """
    import onnx

    from fastrec.exporters.model_spec import quantised_module
    from fastrec.exporters.onnx.export import write_onnx
    from fastrec.exporters.onnx.symmetric import symmetric_int8

    options.allow("profile", "tf32", "workspace", "level", "sparse_weights", "cuda_graph")
    own = quantised_module(model)
    precision = options.precision or ("fp32" if own is None else "int8")
    if (precision == "int8") != (own is not None):
        held = "holds no int8 module" if own is None else f"holds {own}, which is int8"
        raise BackendError(
            f"tensorrt runs an int8 model as it is, and this one {held}: fastrec.quantize_ makes "
            "them"
        )
    cuda_graph = options.setting("cuda_graph", ("on", "off"), "on") == "on"
    sparse = options.setting("sparse_weights", ("auto", "on", "off"))
    shapes = [tuple(t.shape) for t in example_inputs]
    profile = builder.profile_for(options.spec, shapes, options.settings.get("profile"))
    with tempfile.TemporaryDirectory(prefix="fastrec-tensorrt-") as folder:
        file = Path(folder) / "model.onnx"
        write_onnx(model, file, example_inputs)
        proto = onnx.load(file)
    free = _free_sizes(proto)
    spec = options.spec.fixed_to(shapes, keep=[name for name in profile if name in free])
    profile = {name: profile[name] for name in profile if name in free}
    why = "fp32 as exported"
    if own is not None:
        layers = symmetric_int8(proto)
        why = f"int8 of fastrec.quantize_ as QDQ, {layers} activations as symmetric int8"
    elif precision == "fp16":
        proto = builder.to_float16(proto)
        why = "constants and sums in float16, inputs and scores as they were"
    found, total = builder.two_four_weights(proto)
    settings = builder.BuildSettings(
        profile,
        tf32=_flag(options, "tf32", False),
        sparse_weights=sparse == "on" or (sparse == "auto" and 0 < total == found),
        workspace_mb=_number(options, "workspace", 1024, 1, 1 << 20),
        level=_number(options, "level", 3, 0, 5),
    )
    trt, gpu = _tensorrt(), device.gpu()
    plan, source = builder.plan_for(trt, proto.SerializeToString(), spec, settings, gpu)
    ranges = ", ".join(
        f"{n} {low}..{high} best {usual}" for n, (low, usual, high) in profile.items()
    )
    rows = [
        choice(f"strongly typed, {precision}, level {settings.level}", True, None, why),
        choice(f"profile {ranges or 'of the one size'}", True, None, "sizes beyond it are refused"),
        choice("plan", True, None, source),
        choice(
            "2:4 sparse weights",
            settings.sparse_weights,
            None,
            f"{found} of {total} weight matrices have at most two of four values along K",
        ),
        choice("CUDA graph", cuda_graph, None, "one a shape: copies, inference and copy back"),
    ]
    return TensorRtEngine(
        plan,
        gpu=gpu,
        cuda_graph=cuda_graph,
        backend="tensorrt",
        precision=precision,
        threads=options.threads,
        spec=builder.within(spec, profile),
        rows=rows,
        versions=versions(),
    )


def _free_sizes(proto: Any) -> set[str]:
    """Names of the sizes that the export left free."""
    dims = [d for value in proto.graph.input for d in value.type.tensor_type.shape.dim]
    return {d.dim_param for d in dims if d.dim_param}


def _flag(options: BuildOptions, name: str, default: bool) -> bool:
    value = options.settings.get(name, default)
    if type(value) is not bool:
        raise ArgumentError(f"settings[{name!r}]", "True or False", value)
    return value


def _number(options: BuildOptions, name: str, default: int, low: int, high: int) -> int:
    value = options.settings.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise ArgumentError(f"settings[{name!r}]", f"an integer in {low}..{high}", value)
    return value


def load(path: Path, header: dict[str, Any], threads: int | None) -> Engine:
    """Open a checked artifact; imports no torch.

    Raises:
        BackendError: TensorRT cannot run here, or the plan belongs to another GPU or version.
    """
    if (reason := can_run()) is not None:
        raise BackendError(f"tensorrt: {reason}")
    settings = header["settings"]
    gpu = device.gpu()
    here = {"gpu": gpu, "tensorrt": str(_tensorrt().__version__)}
    made = {name: settings[name] for name in here}
    if made != here:
        raise BackendError(
            f"{path} was built for {_shown(made)} and this is {_shown(here)}: a plan runs on no "
            'other; compile the model here with backend="tensorrt"'
        )
    return TensorRtEngine(
        (path / _PLAN).read_bytes(),
        gpu=gpu,
        cuda_graph=settings["cuda_graph"],
        backend="tensorrt",
        precision=header["precision"],
        threads=threads or header["threads"],
        spec=InputSpec.from_dict(header["spec"]),
        rows=header["rows"],
        versions=versions(),
    )


def _shown(about: dict[str, Any]) -> str:
    gpu = about["gpu"]
    return f"{gpu['name']} ({gpu['compute_capability']}), TensorRT {about['tensorrt']}"

"""LiteRT (TFLite) on the CPU: our ONNX export written as a TFLite file, run by ai-edge-litert.

The file is written by ``fastrec.exporters.tflite``. Google's litert-torch needs other versions of
torch and protobuf than the rest of fastrec, knows none of fastrec's layers and chooses int8 scales
of its own (docs/engines/litert.md).
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec.errors import ArtifactError, BackendError, MissingDependencyError, not_installed
from fastrec.measure.choice import choice
from fastrec.measure.packages import missing, package_versions
from fastrec.runtime import artifact
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.spec import InputSpec

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "int8")
INT8_FORMS = ("float", "kernels")
_MODEL = "model.tflite"
_WEIGHTS = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
_WHY = {
    "fp32": "float32 on XNNPACK",
    "fp16": "weights and tables as float16, widened when they are used",
    "int8": "weights int8 with a scale a row; LiteRT quantises each row of an input as it comes",
}


def can_run() -> str | None:
    """None, or why not."""
    if missing("ai_edge_litert"):
        return not_installed("ai-edge-litert", "litert")
    return None


def versions() -> dict[str, str]:
    """Versions of the packages that a build uses."""
    return package_versions("ai-edge-litert", "onnx", "onnxscript", "torch")


def open_interpreter(file: Path, *, threads: int) -> Any:
    """An interpreter of a TFLite file, its memory not yet laid out.

    Raises:
        MissingDependencyError: ai-edge-litert is not installed.
        ArtifactError: not a TFLite file, or one with operators that this LiteRT lacks.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise MissingDependencyError("ai-edge-litert", "litert", "LiteRT") from error
    try:
        return Interpreter(str(file), num_threads=threads)
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"LiteRT cannot read {file}: {error}") from error


class _Interpreter:
    """An interpreter laid out for one set of shapes at a time."""

    def __init__(self, file: Path, names: tuple[str, ...], threads: int) -> None:
        self._interpreter = open_interpreter(file, threads=threads)
        given = {d["name"]: d["index"] for d in self._interpreter.get_input_details()}
        if set(given) != set(names):
            raise ArtifactError(f"{file} takes {sorted(given)}, not the engine's {sorted(names)}")
        self._inputs = [given[name] for name in names]
        self._output = self._interpreter.get_output_details()[0]["index"]
        self._shapes: list[tuple[int, ...]] | None = None

    def run(self, arrays: list[np.ndarray]) -> np.ndarray:
        shapes = [a.shape for a in arrays]
        interpreter = self._interpreter
        if shapes != self._shapes:
            self._shapes = None
            for index, shape in zip(self._inputs, shapes, strict=True):
                interpreter.resize_tensor_input(index, shape)
            interpreter.allocate_tensors()
            self._shapes = shapes
        for index, array in zip(self._inputs, arrays, strict=True):
            # Ids lie within their tables, of at most 2 GB: they fit int32.
            value = array.astype(np.int32) if array.dtype == np.int64 else array
            interpreter.set_tensor(index, value)
        interpreter.invoke()
        scores: np.ndarray = interpreter.get_tensor(self._output)
        return scores


class LiteRtEngine(Engine):
    """An interpreter for the example's shapes, and one that is laid out anew for any other."""

    # XNNPACK's workers sleep within a millisecond after a call, measured.
    spin_s = 0.003

    def __init__(
        self,
        file: Path,
        scratch: Path | None,
        *,
        shapes: list[tuple[int, ...]],
        **about: Any,
    ) -> None:
        super().__init__(**about)
        self._file = file
        artifact.keeps(self, scratch)
        self._shapes = shapes
        # One call at a time: an interpreter's memory belongs to the call that runs in it.
        self._lock = threading.Lock()
        self._usual: _Interpreter | None = self._opened()
        self._other: _Interpreter | None = None

    def _opened(self) -> _Interpreter:
        return _Interpreter(self._file, self.spec.names, self.threads)

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        with self._lock:
            self._require_open()
            usual = self._usual
            assert usual is not None
            if [a.shape for a in arrays] == self._shapes:
                return usual.run(arrays)
            if self._other is None:
                self._other = self._opened()
            return self._other.run(arrays)

    def save(self, path: str | Path) -> Path:
        """Write the TFLite file with its header; see :func:`fastrec.runtime.load_engine`."""
        header = self._header()
        header["settings"] = {"shapes": [list(s) for s in self._shapes]}

        def fill(folder: Path) -> None:
            shutil.copyfile(self._file, folder / _MODEL)

        return artifact.write(path, header, fill)

    def close(self) -> None:
        """Free the interpreters; waits for a call that runs."""
        with self._lock:
            super().close()
            self._usual = self._other = None


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Export to ONNX, write it as TFLite, open an interpreter.

    Settings: ``free_sizes`` ("batch", or "all": history and candidates stay free too), ``int8``
    ("float" or "kernels"): what an int8 layer of ``quantize_`` is, see
    :func:`fastrec.exporters.tflite.convert.to_tflite`.
    """
    options.allow("free_sizes", "int8")
    with artifact.building("litert") as scratch:
        return _build_in(scratch, model, example_inputs, options)


def _build_in(
    scratch: Path,
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    options: BuildOptions,
) -> Engine:
    """Build with ``scratch`` for the files, which becomes the engine's."""
    import onnx

    from fastrec.exporters.model_spec import precision_of
    from fastrec.exporters.onnx.export import static_shapes, write_onnx
    from fastrec.exporters.tflite.convert import to_tflite

    free_sizes = options.setting("free_sizes", ("batch", "all"), "batch")
    form = options.setting("int8", INT8_FORMS, "kernels")
    precision, own = precision_of(model, options.precision, "litert")
    exported = scratch / "model.onnx"
    write_onnx(model, exported, example_inputs, free=("B",) if free_sizes == "batch" else None)
    shapes = [tuple(t.shape) for t in example_inputs]
    why = _WHY[precision]
    if own is not None:
        why = "int8 of fastrec.quantize_: its scales and weights; " + (
            "its integers, multiplied in float32"
            if form == "float"
            else "LiteRT's int8 kernels between integers, else its integers multiplied in float32"
        )
    spec = static_shapes(options.spec, example_inputs, free_sizes)
    to_tflite(
        onnx.load(exported),
        scratch / _MODEL,
        options.spec.sizes(shapes),
        int8=form,
        weights="float32" if own is not None else _WEIGHTS[precision],
        metadata={"fastrec": json.dumps({"inputs": spec.to_dict(), "precision": precision})},
    )
    exported.unlink()
    return LiteRtEngine(
        scratch / _MODEL,
        scratch,
        shapes=shapes,
        backend="litert",
        precision=precision,
        threads=options.threads,
        spec=spec,
        rows=[choice(f"XNNPACK, num_threads={options.threads}, int32 ids", True, None, why)],
        versions=versions(),
    )


def load(path: Path, header: dict[str, Any], threads: int | None) -> Engine:
    """Open a checked artifact; imports no torch."""
    if (reason := can_run()) is not None:
        raise BackendError(f"litert: {reason}")
    return LiteRtEngine(
        path / _MODEL,
        None,
        shapes=[tuple(s) for s in header["settings"]["shapes"]],
        backend="litert",
        precision=header["precision"],
        threads=threads or header["threads"],
        spec=InputSpec.from_dict(header["spec"]),
        rows=header["rows"],
        versions=versions(),
    )

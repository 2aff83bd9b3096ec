"""ONNX Runtime on the CPU: fp32, and int8 by its own dynamic quantiser.

Measured on the canonical ranker: per-channel QInt8 weights of all supported operators, without
reduce_range, are the fastest; static QDQ (u8 or s8 activations) is 8 to 20 % slower, so it is not
offered. Pre-processing the graph and other spinning settings change nothing.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec.errors import ArtifactError, BackendError, MissingDependencyError
from fastrec.runtime import artifact
from fastrec.runtime.choose import choice
from fastrec.runtime.engine import BuildOptions, Engine, closed_loop, missing, package_versions
from fastrec.runtime.machine import int8_products_saturate
from fastrec.runtime.spec import InputSpec

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "int8")
_MODEL = "model.onnx"


def can_run() -> str | None:
    """None, or why not."""
    if missing("onnxruntime"):
        return "onnxruntime is not installed: pip install 'fastrec[onnx]'"
    return None


def versions() -> dict[str, str]:
    """Versions of the packages that a build uses."""
    return package_versions("onnxruntime", "onnx", "onnxscript", "torch")


def open_session(path: str | Path, *, threads: int) -> Any:
    """A CPU session with all graph optimisations on ``threads`` threads.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: the file is not a model that ONNX Runtime can read.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "onnx", "ONNX Runtime") from error
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Without VNNI its u8 x s8 products saturate in int16 (see machine.int8_products_saturate); this
    # makes the weights u8, whose products do not. It changes nothing where there is VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
    ) as error:
        raise ArtifactError(f"ONNX Runtime cannot read {path}: {error}") from error


class OnnxRuntimeEngine(Engine):
    """A session fed with plain numpy arrays."""

    # Its workers spin for 40 ms after a run, measured.
    spin_s = 0.05

    def __init__(self, file: Path, scratch: Path | None, **about: Any) -> None:
        super().__init__(**about)
        self._file = file
        if scratch is not None:
            # A folder of the engine's own, which goes when it goes.
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self._session = open_session(file, threads=self.threads)
        self._single: Any = None

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        scores: np.ndarray = self._session.run(
            None, dict(zip(self.spec.names, arrays, strict=True))
        )[0]
        return scores

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """The better of one call on all threads at a time, and one single-threaded call each."""
        together = super().throughput(requests, seconds=seconds)
        if self.threads == 1:
            return together
        if self._single is None:
            self._single = open_session(self._file, threads=1)
        names = self.spec.names

        def call(*inputs: np.ndarray) -> None:
            self._single.run(None, dict(zip(names, inputs, strict=True)))

        return max(together, closed_loop(call, requests, self.threads, seconds))

    def save(self, path: str | Path) -> Path:
        """Write the ONNX model with its header; see :func:`fastrec.runtime.load_engine`."""
        return artifact.write(
            path, self._header(), lambda folder: _copy(self._file, folder / _MODEL)
        )

    def close(self) -> None:
        """Free the session."""
        super().close()
        self._session = self._single = None


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Export to ONNX, quantise if asked, open a session.

    Settings: ``free_sizes`` ("batch", or "all": history and candidates stay free too).
    """
    options.allow("free_sizes")
    scratch = Path(tempfile.mkdtemp(prefix="fastrec-onnx-"))
    try:
        return _build_in(scratch, model, example_inputs, options)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _build_in(
    scratch: Path,
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    options: BuildOptions,
) -> Engine:
    """Build with ``scratch`` for the files, which becomes the engine's."""
    from fastrec.runtime.model_spec import quantised_module
    from fastrec.runtime.onnx_export import static_shapes, write_onnx
    from fastrec.runtime.trace import quiet

    file = scratch / _MODEL
    free_sizes = options.setting("free_sizes", ("batch", "all"), "batch")
    write_onnx(model, file, example_inputs, free=("B",) if free_sizes == "batch" else None)
    own = quantised_module(model)
    if own is not None and options.precision is not None:
        raise BackendError(
            f"onnxruntime: {own} is quantised already: leave precision at None to run its own int8"
        )
    precision = options.precision or ("fp32" if own is None else "int8")
    why = "fp32, every graph optimisation"
    if own is not None:
        why = "int8 of fastrec.quantize_ as QDQ, its own scales"
    if options.precision == "int8":
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        from fastrec.runtime.onnx_sharing import unshare_int8

        quantised = file.with_name("int8.onnx")
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it logs advice about pre-processing to the root logger
        try:
            with quiet():
                quantize_dynamic(file, quantised, weight_type=QuantType.QInt8, per_channel=True)
                proto = onnx.load(quantised)
                unshare_int8(proto)
                onnx.save(proto, quantised)
        finally:
            root.setLevel(level)
        file.unlink()
        file = quantised
        why = "dynamic, per-channel QInt8 weights: measured faster than static QDQ"
    if precision == "int8" and int8_products_saturate():
        why += "; no VNNI here, so weights as uint8 (session.x64quantprecision), exact but slower"
    threads = f"intra_op_num_threads={options.threads}, inter_op 1, ORT_ENABLE_ALL"
    return OnnxRuntimeEngine(
        file,
        scratch,
        backend="onnxruntime",
        precision=precision,
        threads=options.threads,
        spec=static_shapes(options.spec, example_inputs, free_sizes),
        rows=[choice(threads, True, None, why)],
        versions=versions(),
    )


def load(path: Path, header: dict[str, Any], threads: int | None) -> Engine:
    """Open a checked artifact; imports no torch."""
    if (reason := can_run()) is not None:
        raise BackendError(f"onnxruntime: {reason}")
    return OnnxRuntimeEngine(
        path / _MODEL,
        None,
        backend="onnxruntime",
        precision=header["precision"],
        threads=threads or header["threads"],
        spec=InputSpec.from_dict(header["spec"]),
        rows=header["rows"],
        versions=versions(),
    )

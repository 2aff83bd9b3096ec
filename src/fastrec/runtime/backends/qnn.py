"""Qualcomm's Hexagon processor (HTP) through ONNX Runtime's QNN provider.

A build prepares the whole model for one chip and keeps the result as a context binary inside an
ONNX file: what a device loads without preparing anything. On x86 the provider's library simulates
the processor, so that answers can be checked where models are made; its times say nothing.
"""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec.errors import (
    ArgumentError,
    ArtifactError,
    BackendError,
    MissingDependencyError,
    not_installed,
)
from fastrec.measure.choice import choice
from fastrec.measure.packages import missing, package_versions
from fastrec.runtime import artifact
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.spec import InputSpec

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp16", "int8")
_PROVIDER = "QNNExecutionProvider"
_MODEL = "model.onnx"
# Snapdragon 8 Gen 3 and its Hexagon V75. Without a chip the simulator takes one that has no floats.
_SOC_MODEL, _HTP_ARCH = "57", "75"


def can_run() -> str | None:
    """None, or why not."""
    for package, module in (("onnxruntime-qnn", "onnxruntime_qnn"), ("onnxruntime", "onnxruntime")):
        if missing(module):
            return not_installed(package, "qnn")
    return None


def simulated() -> bool:
    """Whether this machine has no Hexagon processor and the library stands in for it."""
    return platform.machine() in ("x86_64", "AMD64")


def versions() -> dict[str, str]:
    """Versions of the packages that a build uses."""
    return package_versions("onnxruntime", "onnxruntime-qnn", "onnx", "onnxscript", "torch")


def _devices() -> tuple[Any, list[Any]]:
    """ONNX Runtime and what the provider runs on; its library is registered once a process.

    Raises:
        MissingDependencyError: a package is not installed.
        BackendError: the provider finds nothing to run on.
    """
    try:
        import onnxruntime as ort
        import onnxruntime_qnn
    except ImportError as error:
        raise MissingDependencyError("onnxruntime-qnn", "qnn", "QNN") from error

    def found() -> list[Any]:
        return [d for d in ort.get_ep_devices() if d.ep_name == _PROVIDER]

    if not found():
        ort.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    devices = found()
    if not devices:
        raise BackendError("qnn: its provider finds no processor to run on")
    return ort, devices[:1]


def _session(
    file: Path, settings: dict[str, str], *, threads: int, context: Path | None = None
) -> Any:
    """A session on the HTP; ``context`` is where the prepared model is written.

    Raises:
        ArtifactError: the file is not a model that ONNX Runtime can read.
        BackendError: the HTP cannot take the model.
    """
    ort, devices = _devices()
    import onnxruntime_qnn
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_provider_for_devices(
        devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **settings}
    )
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if context is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(context))
        options.add_session_config_entry("ep.context_embed_mode", "1")
    try:
        return ort.InferenceSession(str(file), options)
    except (state.InvalidProtobuf, state.NoSuchFile, state.InvalidGraph) as error:
        raise ArtifactError(f"ONNX Runtime cannot read {file}: {error}") from error
    except (state.EPFail, state.Fail, state.InvalidArgument, state.RuntimeException) as error:
        raise BackendError(f"QNN cannot prepare the model for {settings}: {error}") from error


class QnnEngine(Engine):
    """A session on a context binary, of the example's sizes."""

    spin_s = 0.05

    def __init__(
        self, file: Path, scratch: Path | None, settings: dict[str, str], **about: Any
    ) -> None:
        super().__init__(**about)
        self._file, self._settings = file, settings
        artifact.keeps(self, scratch)
        self._session: Any = _session(file, settings, threads=self.threads)

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        names = self.spec.names
        scores: np.ndarray = self._session.run(None, dict(zip(names, arrays, strict=True)))[0]
        return scores

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file with its context binary, and the header."""
        header = self._header()
        header["settings"] = self._settings

        def fill(folder: Path) -> None:
            shutil.copyfile(self._file, folder / _MODEL)

        return artifact.write(path, header, fill)

    def close(self) -> None:
        """Free the session."""
        super().close()
        self._session = None


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Export to ONNX with the examples' sizes, prepare it for a chip, open it.

    Settings: ``soc_model`` and ``htp_arch``, Qualcomm's numbers of the chip (digits, as text).
    Floats are float16 on this processor.
    """
    options.allow("soc_model", "htp_arch")
    settings = {"soc_model": _SOC_MODEL, "htp_arch": _HTP_ARCH, **options.settings}
    for name, value in settings.items():
        if not (isinstance(value, str) and value.isdigit()):
            raise ArgumentError(f"settings[{name!r}]", "a number of Qualcomm's as text", value)
    with artifact.building("qnn") as scratch:
        return _build_in(scratch, model, example_inputs, options, settings)


def _build_in(
    scratch: Path,
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    options: BuildOptions,
    settings: dict[str, str],
) -> Engine:
    """Build with ``scratch`` for the files, which becomes the engine's."""
    from fastrec.exporters.model_spec import quantised_module
    from fastrec.exporters.onnx.export import write_onnx

    precision = "fp16" if quantised_module(model) is None else "int8"
    if options.precision not in (None, precision):
        raise BackendError(
            f"qnn runs this model in {precision}: float models are float16 on the HTP, int8 models "
            "are made by fastrec.quantize_"
        )
    exported = scratch / "exported.onnx"
    write_onnx(model, exported, example_inputs, free=())
    prepared = _session(exported, settings, threads=options.threads, context=scratch / _MODEL)
    rows = [_placement(prepared)]
    del prepared
    if not (scratch / _MODEL).is_file():
        raise BackendError("qnn: the HTP takes no part of this model")
    exported.unlink()
    where = "simulated: its times say nothing" if simulated() else "on this machine's HTP"
    chip = ", ".join(f"{name} {value}" for name, value in settings.items())
    return QnnEngine(
        scratch / _MODEL,
        scratch,
        settings,
        backend="qnn",
        precision=precision,
        threads=options.threads,
        spec=options.spec.fixed_to([tuple(t.shape) for t in example_inputs]),
        rows=[choice(f"HTP, {chip}, context binary", True, None, where), *rows],
        versions=versions(),
    )


def _placement(session: Any) -> dict[str, Any]:
    """A row about the operators that the HTP leaves to the CPU."""
    left: Counter[str] = Counter()
    taken = 0
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        if part.ep_name == _PROVIDER:
            taken += len(nodes)
        else:
            left.update(node.op_type for node in nodes)
    rest = ", ".join(f"{n} {kind}" for kind, n in sorted(left.items())) or "none"
    why = f"{taken} operators on the HTP; refused by QNN's validation, so on the CPU: {rest}"
    return choice("operators", True, None, why)


def load(path: Path, header: dict[str, Any], threads: int | None) -> Engine:
    """Open a checked artifact; imports no torch."""
    if (reason := can_run()) is not None:
        raise BackendError(f"qnn: {reason}")
    return QnnEngine(
        path / _MODEL,
        None,
        header["settings"],
        backend="qnn",
        precision=header["precision"],
        threads=threads or header["threads"],
        spec=InputSpec.from_dict(header["spec"]),
        rows=header["rows"],
        versions=versions(),
    )

"""ONNX Runtime sessions: an execution provider by name, never another one in its place.

ONNX Runtime itself warns and goes on with the CPU where a provider is missing or does not load, and
builds a new session on the CPU where a run fails. Here both raise.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrec import env
from fastrec.errors import ArtifactError, BackendError, MissingDependencyError, not_installed
from fastrec.exporters.onnx import custom_ops as ort_custom_ops
from fastrec.measure.packages import missing, package_versions

CPU = "CPUExecutionProvider"
# name -> (ONNX Runtime's name, packages that hold it, the module of a plugin that does)
PROVIDERS: dict[str, tuple[str, str, str | None]] = {
    "cpu": (CPU, "onnxruntime", None),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu", None),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu and tensorrt", None),
    "openvino": (
        "OpenVINOExecutionProvider",
        "onnxruntime-openvino or onnxruntime-ep-openvino",
        "onnxruntime_ep_openvino",
    ),
    "migraphx": ("MIGraphXExecutionProvider", "onnxruntime-migraphx", None),
    "rocm": ("ROCMExecutionProvider", "onnxruntime-rocm", None),
    "qnn": ("QNNExecutionProvider", "onnxruntime-qnn", "onnxruntime_qnn"),
}


@dataclass(frozen=True)
class SessionSettings:
    """How a session runs.

    Args:
        provider: a key of :data:`PROVIDERS`.
        provider_options: the provider's own options, beyond those set here.
        spinning: whether idle workers keep their core for a while, which the next call gains by.
        inter_op: operators that may run at once; more than 1 makes a session parallel.
        io_binding: whether inputs and outputs are bound to the session's memory, which saves copies
            on devices of their own.
        custom_ops: whether the session knows the operators of
            ``fastrec.exporters.onnx.custom_ops``.
        cpu_nodes: whether nodes that the provider cannot run may run on the CPU; ``describe()``
            counts them.
    """

    provider: str = "cpu"
    provider_options: dict[str, str] = field(default_factory=dict)
    spinning: bool = True
    inter_op: int = 1
    io_binding: bool = False
    cpu_nodes: bool = True
    custom_ops: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SessionSettings:
        """Reverse of :meth:`to_dict`.

        Raises:
            ArtifactError: other keys, or a provider that this version does not know.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if set(values) - known or values.get("provider", "cpu") not in PROVIDERS:
            raise ArtifactError(f"engine.json holds session settings that are none: {values}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def open_session(path: str | Path, *, threads: int, settings: SessionSettings | None = None) -> Any:
    """A session with all graph optimisations on ``threads`` threads, on the CPU by default.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        BackendError: the provider is not there, does not load, or leaves nodes to the CPU that may
            not run there; names what is installed.
        ArtifactError: the file is not a model that ONNX Runtime can read.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "onnx", "ONNX Runtime") from error
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    settings = settings or SessionSettings()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = settings.inter_op
    if settings.inter_op > 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    entries = {
        # Without VNNI its u8 x s8 products saturate in int16 (see machine.int8_products_saturate);
        # this makes the weights u8, whose products do not. It changes nothing where there is VNNI.
        "session.x64quantprecision": "1",
        "session.intra_op.allow_spinning": str(int(settings.spinning)),
        "session.inter_op.allow_spinning": str(int(settings.spinning)),
    }
    if settings.provider != "cpu":
        entries["session.record_ep_graph_assignment_info"] = "1"
        entries["session.disable_cpu_ep_fallback"] = str(int(not settings.cpu_nodes))
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if settings.custom_ops:
        ort_custom_ops.register(options)
    unreadable = (
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
    )
    wanted = _providers(ort, options, settings, threads)
    with warnings.catch_warnings():
        # What it warns about is raised below.
        warnings.simplefilter("ignore")
        try:
            session = ort.InferenceSession(str(path), options, providers=wanted)
        except unreadable as error:
            raise ArtifactError(f"ONNX Runtime cannot read {path}: {error}") from error
        except (state.Fail, state.EPFail, state.RuntimeException) as error:
            if settings.provider == "cpu":
                raise ArtifactError(f"ONNX Runtime cannot read {path}: {error}") from error
            raise BackendError(f"{_full(settings)} cannot run this model: {error}") from error
    if _full(settings) not in session.get_providers():
        raise BackendError(
            f"{_full(settings)} did not load: the session has {', '.join(session.get_providers())}"
            f"; {_installed(ort)}"
        )
    session.disable_fallback()  # a run that fails raises, instead of going on on the CPU
    return session


def nodes_by_provider(session: Any) -> dict[str, int]:
    """How many nodes each provider runs; empty where ONNX Runtime does not say."""
    counts: dict[str, int] = {}
    for group in getattr(session, "get_provider_graph_assignment_info", list)():
        counts[group.ep_name] = counts.get(group.ep_name, 0) + len(group.get_nodes())
    return counts


def provider_reason(provider: str) -> str | None:
    """Why ONNX Runtime has no such provider here, or None; it may still fail to load."""
    if missing("onnxruntime"):
        return not_installed("onnxruntime", "onnx")
    import onnxruntime as ort

    name, package, _ = PROVIDERS[provider]
    plugin = _plugin(provider)
    if plugin is None:
        if name in ort.get_available_providers():
            return None
        return f"this ONNX Runtime has no {name}: pip install {package}; {_installed(ort)}"
    if not _plugin_devices(ort, plugin):
        found = sorted({str(d.device.type).split(".")[-1] for d in ort.get_ep_devices()})
        return f"{plugin} finds no device that it supports among {', '.join(found)}"
    return None


def _plugin(provider: str) -> str | None:
    """The module of a provider that is a package of its own, where it is installed. It goes first:
    once loaded it is listed beside those built in, and cannot be opened as they are."""
    plugin = PROVIDERS[provider][2]
    return None if plugin is None or missing(plugin) else plugin


def _full(settings: SessionSettings) -> str:
    return PROVIDERS[settings.provider][0]


def _installed(ort: Any) -> str:
    held = package_versions(
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-openvino",
        "onnxruntime-migraphx",
        "onnxruntime-rocm",
        "onnxruntime-ep-openvino",
        "onnxruntime-qnn",
    )
    packages = ", ".join(f"{name} {version}" for name, version in held.items())
    return f"installed: {packages} with {', '.join(ort.get_available_providers())}"


def _providers(
    ort: Any, options: Any, settings: SessionSettings, threads: int
) -> list[tuple[str, dict[str, str]]] | None:
    """The providers of a session; None where a plugin's devices were added to the options."""
    if (reason := provider_reason(settings.provider)) is not None:
        raise BackendError(f"provider {settings.provider!r}: {reason}")
    name = PROVIDERS[settings.provider][0]
    plugin = _plugin(settings.provider)
    chosen = {**_defaults(settings.provider, threads), **settings.provider_options}
    if plugin is not None:
        options.add_provider_for_devices(_plugin_devices(ort, plugin), chosen)
        return None
    wanted = [(name, chosen)]
    if settings.provider != "cpu" and settings.cpu_nodes:
        wanted.append((CPU, {}))
    return wanted


_registered: set[str] = set()


def _plugin_devices(ort: Any, plugin: str) -> list[Any]:
    """Devices of a provider that comes as a package of its own, loaded once a process."""
    module = importlib.import_module(plugin)
    name = module.get_ep_name()
    if plugin not in _registered:
        try:
            ort.register_execution_provider_library(name, module.get_library_path())
        except RuntimeError as error:
            raise BackendError(f"{plugin} does not load: {error}") from error
        _registered.add(plugin)
    return [device for device in ort.get_ep_devices() if device.ep_name == name]


def _defaults(provider: str, threads: int) -> dict[str, str]:
    """Options of a provider that its users would set."""
    cache = env.cache_dir() / "onnxruntime"
    return {
        "tensorrt": {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache / "tensorrt"),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache / "tensorrt"),
        },
        "openvino": {"num_of_threads": str(threads)},
    }.get(provider, {})

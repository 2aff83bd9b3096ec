"""Which packages are installed, told without importing them, and which extra brings each."""

from __future__ import annotations

from importlib import metadata, util

# Extra -> the distributions it brings, as in pyproject.toml.
EXTRAS = {
    "torch": ("torch",),
    "data": ("polars",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "litert": ("ai-edge-litert",),
    "qnn": ("onnxruntime-qnn",),
    "tensorrt": ("tensorrt",),
    "report": ("matplotlib", "psutil"),
    "serve": ("grpcio", "protobuf", "h11", "prometheus-client", "uvloop"),
    "otel": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc"),
    "ray": ("ray",),
    "cuda": ("triton", "cupy-cuda13x", "nvidia-cuda-nvrtc"),
}
# Modules that are not called as their distributions are.
_MODULES = {
    "grpc": "grpcio",
    "google": "protobuf",
    "cupy": "cupy-cuda13x",
    "opentelemetry": "opentelemetry-sdk",
}


def extra_of(module: str) -> str | None:
    """The extra that brings a top-level module; None where none does."""
    package = _MODULES.get(module, module.replace("_", "-"))
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def package_versions(*packages: str) -> dict[str, str]:
    """Package -> installed version, from the metadata (nothing is imported)."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing(module: str) -> bool:
    """Whether ``import module`` would fail for want of the package."""
    try:
        return util.find_spec(module) is None
    except (ModuleNotFoundError, ValueError):
        return True

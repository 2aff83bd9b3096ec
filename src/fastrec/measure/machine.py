"""The machine card: hardware and versions behind a figure, without host name, user or paths."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import fastrec
from fastrec import env
from fastrec.measure.packages import package_versions

# Instruction sets that decide which kernels run, as /proc/cpuinfo spells them.
_FLAGS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_PACKAGES = ("numpy", "torch", "onnxruntime", "onnx", "openvino", "nncf", "polars", "safetensors")
_CPU = Path("/sys/devices/system/cpu/cpu0")


def machine_card() -> dict[str, Any]:
    """CPU, memory, OS, versions, threads, date and commit; None where something is not readable."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or None,
        "cpu_family_model_stepping": [info.get(key) for key in ("cpu family", "model", "stepping")],
        "cores_online": os.cpu_count(),
        "cores_usable": usable_cpus(),
        "isa": [flag for flag in _FLAGS if flag in flags],
        "caches": _caches(),
        "memory_gb": _memory_gb(),
        "governor": _read(_CPU / "cpufreq/scaling_governor"),
        "hypervisor": "hypervisor" in flags,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "fastrec": fastrec.__version__,
        "kernel_isa": _kernel_isa(),
        "packages": package_versions(*_PACKAGES),
        "omp_num_threads": env.omp_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_identity() -> list[Any]:
    """Key for cached code and timings: the CPU, its instruction sets and the usable cores."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    model = [info.get(key) for key in ("model name", "cpu family", "model", "stepping")]
    return [platform.machine(), *model, [flag for flag in _FLAGS if flag in flags], usable_cpus()]


def int8_products_saturate() -> bool:
    """Whether this is an x86 CPU without VNNI, where other runtimes multiply uint8 by int8 with
    ``vpmaddubsw``: it adds pairs of products in 16 bits, and 2 * 255 * 127 does not fit."""
    flags = set(_cpuinfo().get("flags", "").split())
    return "avx2" in flags and not flags & {"avx_vnni", "avx512_vnni", "amx_int8"}


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    text = _read(Path("/proc/cpuinfo")) or ""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, str]:
    """Cache -> size as the first core sees it, e.g. ``{"L1 Data": "32K"}``."""
    caches = {}
    for index in sorted((_CPU / "cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and kind and size:
            caches[f"L{level} {kind}"] = size
    return caches


def _memory_gb() -> float | None:
    line = (_read(Path("/proc/meminfo")) or "").split("\n")[0].split()
    return round(int(line[1]) * 1024 / 1e9, 1) if len(line) >= 2 else None


def _kernel_isa() -> str | None:
    from fastrec.kernels import active_isa
    from fastrec.kernels._compiled import reason_missing

    return None if reason_missing() else active_isa()


def _commit() -> str | None:
    """Commit of the checkout that this package is imported from, with ``+`` for local changes."""
    root = Path(fastrec.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit

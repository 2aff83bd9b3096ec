"""Builds the compiled CPU kernels (csrc/cpu) as ``fastrec._native``.

Needs setuptools, pybind11 and a C++20 compiler; never torch, and nothing is downloaded.
``FASTREC_BUILD_CPU``: unset = build if the machine can, 1 = fail if it can't, 0 = skip.
``FASTREC_BUILD_CUDA``: the same for csrc/cuda, which holds no kernel yet: 1 therefore fails.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent


def tri_state(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}: expected unset, 0 or 1, got {value!r}")
    return value


def cpu_extension(*, required: bool) -> Pybind11Extension:
    # The C++ tests are programs of their own (make sanitize).
    paths = [p for p in (ROOT / "csrc/cpu").rglob("*.cpp") if p.parent.name != "tests"]
    sources = sorted(str(p.relative_to(ROOT)) for p in paths)
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").rglob("*.h"))
    flags = ["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
    if os.uname().machine == "x86_64":
        # One baseline for every file; code for a newer ISA sits in `#pragma GCC target` regions.
        flags.append("-march=x86-64")
    return Pybind11Extension(
        "fastrec._native",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc/cpu")],
        cxx_std=20,
        extra_compile_args=flags + os.environ.get("FASTREC_EXTRA_CXXFLAGS", "").split(),
        extra_link_args=["-pthread", *os.environ.get("FASTREC_EXTRA_LDFLAGS", "").split()],
        optional=not required,
    )


if tri_state("FASTREC_BUILD_CUDA") == "1":
    sys.exit(
        "FASTREC_BUILD_CUDA=1: this version has no CUDA kernels to build (see csrc/cuda/README.md)"
    )

build_cpu = tri_state("FASTREC_BUILD_CPU")
ext_modules = [] if build_cpu == "0" else [cpu_extension(required=build_cpu == "1")]
ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=ext_modules, cmdclass={"build_ext": build_ext})

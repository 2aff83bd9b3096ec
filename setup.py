"""Builds the compiled CPU kernels (csrc/cpu) as ``fastrec._native``, the engine with its C
interface as ``fastrec/lib/libfastrec.so``, some kernels as custom ops for ONNX Runtime
(csrc/onnxruntime), and, where nvcc is, the CUDA kernels (csrc/cuda) as ``fastrec._native_cuda``.

Needs setuptools, pybind11 and a C++20 compiler; never torch, and nothing is downloaded.

| variable | meaning |
|---|---|
| ``FASTREC_BUILD_CPU`` | unset = build if the machine can, 1 = fail if it can't, 0 = skip |
| ``FASTREC_BUILD_CUDA`` | the same for csrc/cuda, which needs nvcc (``CUDA_HOME`` or ``PATH``) |
| ``FASTREC_CUDA_ARCHS`` | architectures, ``;`` between them; default 80;90a;100 |
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CUDA = ROOT / "csrc/cuda"
CPU = ROOT / "csrc/cpu"
CUSTOM_OPS = ROOT / "csrc/onnxruntime"
C_INTERFACE = CPU / "engine/c_api.cpp"
C_HEADER = CPU / "engine/fastrec.h"
LIBRARY = "fastrec.lib.libfastrec"


def tri_state(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}: expected unset, 0 or 1, got {value!r}")
    return value


def within_root(paths: "list[Path]") -> "list[str]":
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def cpu_extension(*, required: bool) -> Pybind11Extension:
    # The C++ tests are programs of their own (make sanitize).
    sources = [p for p in CPU.rglob("*.cpp") if p.parent.name != "tests" and p != C_INTERFACE]
    return extension("fastrec._native", sources, [CPU], required=required)


def c_library(*, required: bool) -> Pybind11Extension:
    """The engine without Python, no module: only the functions of fastrec.h are visible."""
    binding = ("bind.cpp", "module.cpp")
    sources = [p for p in CPU.rglob("*.cpp") if p.parent.name != "tests" and p.name not in binding]
    library = extension(LIBRARY, sources, [CPU], required=required)
    exports = CPU / "engine/fastrec.map"
    library.depends += within_root([exports])
    library.extra_link_args += [f"-Wl,--version-script={exports}", "-Wl,-soname,libfastrec.so"]
    return library


def extension(
    name: str, sources: "list[Path]", folders: "list[Path]", *, required: bool
) -> Pybind11Extension:
    flags = ["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
    if os.uname().machine == "x86_64":
        # One baseline for every file; code for a newer ISA sits in `#pragma GCC target` regions.
        flags.append("-march=x86-64")
    return Pybind11Extension(
        name,
        within_root(sources),
        depends=within_root([path for folder in folders for path in folder.rglob("*.h")]),
        include_dirs=[str(folder) for folder in folders],
        cxx_std=20,
        extra_compile_args=flags + os.environ.get("FASTREC_EXTRA_CXXFLAGS", "").split(),
        extra_link_args=["-pthread", *os.environ.get("FASTREC_EXTRA_LDFLAGS", "").split()],
        optional=not required,
    )


def custom_ops_extension(*, required: bool) -> Pybind11Extension:
    """A library for ONNX Runtime, no module: the kernels that its ops run, without Python."""
    kernels = [CPU / "cpu_features.cpp"]
    for op in ("sparse_int8_linear", "window_sparse_attention"):
        kernels += [path for path in (CPU / op).glob("*.cpp") if path.name != "bind.cpp"]
    sources = [*kernels, *CUSTOM_OPS.glob("*.cpp")]
    return extension("fastrec._onnxruntime_ops", sources, [CPU, CUSTOM_OPS], required=required)


def use_compiler_cache() -> None:
    """Compile through ccache where there is one, unless CC or CXX say what to use."""
    for name in ("CC", "CXX"):
        if shutil.which("ccache") and (compiler := sysconfig.get_config_var(name)):
            os.environ.setdefault(name, f"ccache {compiler.split()[0]}")


def nvcc() -> "str | None":
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def cuda_architectures() -> "list[str]":
    """nvcc's flags: machine code for each, and PTX of the last for GPUs newer than all of them."""
    archs = os.environ.get("FASTREC_CUDA_ARCHS", "80;90a;100").split(";")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class CudaExtension(Extension):
    """Everything is compiled and linked by nvcc, which knows where its runtime lies."""

    def __init__(self, compiler: "str | None", *, required: bool) -> None:
        self.nvcc = compiler
        units = [CUDA / "module.cpp", *CUDA.glob("*/launch.cu"), *CUDA.glob("*/bind.cpp")]
        headers = [path for suffix in ("h", "cuh") for path in CUDA.rglob(f"*.{suffix}")]
        super().__init__(
            "fastrec._native_cuda",
            within_root(units),
            depends=within_root(headers),
            optional=not required,
        )

    def build(self, target: Path, folder: Path) -> None:
        inputs = [ROOT / name for name in (*self.sources, *self.depends, "setup.py")]
        if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
            return
        if self.nvcc is None:
            raise CompileError("FASTREC_BUILD_CUDA=1: no nvcc in CUDA_HOME or PATH")
        includes = [CUDA, sysconfig.get_path("include"), pybind11.get_include()]
        flags = [self.nvcc, "-O3", "-std=c++17", "-cudart=static", "--threads=0"]
        flags += [f"-I{path}" for path in includes]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *cuda_architectures()]

        def compiled(source: str) -> Path:
            out = folder / source.replace("/", "_").replace(os.sep, "_")
            out = out.with_suffix(out.suffix + ".o")
            folder.mkdir(parents=True, exist_ok=True)
            run([*flags, "-c", source, "-o", str(out)])
            return out

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = [str(path) for path in pool.map(compiled, self.sources)]
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*flags, "-shared", *objects, "-o", str(target)])


def run(command: "list[str]") -> None:
    sys.stdout.write(" ".join(command) + "\n")
    sys.stdout.flush()
    if subprocess.run(command, cwd=ROOT).returncode:
        raise CompileError(f"{command[0]} failed; its messages are above")


class BuildExt(build_ext):
    """Hands CUDA's extension to nvcc; compiles what two extensions share once."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def announced(target: str, source: str, *rest: object) -> None:
            sys.stdout.write(f"compiling {source}\n")  # minutes without a line look like a failure
            sys.stdout.flush()
            compile_one(target, source, *rest)

        self.compiler._compile = announced
        every = self.extensions
        after = [ext for ext in every if ext.name in ("fastrec._onnxruntime_ops", LIBRARY)]
        self.extensions = [ext for ext in every if ext not in after]
        super().build_extensions()  # several at once, where asked to
        shared = {source for ext in self.extensions for source in ext.sources}
        self.extensions = after
        for ext in after:
            self.reuse_objects(ext, shared)
        super().build_extensions()
        self.extensions = every

    def reuse_objects(self, ext: Extension, shared: "set[str]") -> None:
        for source in [s for s in ext.sources if s in shared]:
            (compiled,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if os.path.exists(compiled):
                ext.sources.remove(source)
                ext.extra_objects.append(compiled)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname in (LIBRARY, LIBRARY.rpartition(".")[2]):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if any(ext.name == LIBRARY for ext in self.extensions):
            self.copy_header(ROOT / "src")

    def copy_header(self, base: Path) -> None:
        self.mkpath(str(base / "fastrec/include"))
        self.copy_file(str(C_HEADER), str(base / "fastrec/include"))

    def build_extension(self, ext: Extension) -> None:
        if ext.name == LIBRARY:
            self.copy_header(Path(self.build_lib))
        if isinstance(ext, CudaExtension):
            target = Path(self.get_ext_fullpath(ext.name)).absolute()
            ext.build(target, Path(self.build_temp).absolute() / "cuda")
        else:
            super().build_extension(ext)


class BuildPy(build_py):
    """Ships csrc/cuda's headers, which NVRTC compiles where the compiled part is missing."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in CUDA.rglob("*.cuh"):
                to = Path(self.build_lib) / "fastrec/_cuda_sources" / path.relative_to(CUDA)
                self.mkpath(str(to.parent))
                self.copy_file(str(path), str(to))


use_compiler_cache()
build_cpu, build_cuda = tri_state("FASTREC_BUILD_CPU"), tri_state("FASTREC_BUILD_CUDA")
ext_modules: "list[Extension]" = []
if build_cpu != "0":
    ext_modules.append(cpu_extension(required=build_cpu == "1"))
    if sys.platform == "linux":
        ext_modules.append(c_library(required=build_cpu == "1"))
        ext_modules.append(custom_ops_extension(required=build_cpu == "1"))
if build_cuda == "1" or (build_cuda == "" and nvcc()):
    ext_modules.append(CudaExtension(nvcc(), required=build_cuda == "1"))
ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=ext_modules, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})

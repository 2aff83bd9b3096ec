"""The wheel, installed into an empty environment that has no compiler.

``make wheel-check`` compiles everything anew; in the suite the wheel takes the compiled part that
is there already, as long as no source is newer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_engine import write

from fastrec.kernels._compiled import reason_missing

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
UNREACHABLE = ("NewConnectionError", "ConnectTimeoutError", "ProxyError", "NameResolutionError")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    given = os.environ.get("FASTREC_WHEEL_CHECK")
    if given:
        return Path(given)
    if reason := reason_missing():
        pytest.skip(f"the compiled part is missing: {reason}")
    base = tmp_path_factory.mktemp("build")
    (base / "lib/fastrec/lib").mkdir(parents=True)
    package = ROOT / "src/fastrec"
    parts = ("_native.*.so", "_onnxruntime_ops.*.so", "lib/libfastrec.so")
    for part in [path for name in parts for path in package.glob(name)]:
        shutil.copy2(part, base / "lib/fastrec" / part.relative_to(package))
    build = ["build", f"--build-base={base}", f"--build-platlib={base / 'lib'}"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={base}", *build,
         "bdist_wheel", f"--bdist-dir={base / 'bdist'}", f"--dist-dir={base / 'dist'}"],
        cwd=ROOT, env={**os.environ, "FASTREC_BUILD_CPU": "1", "FASTREC_BUILD_CUDA": "0"},
        check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    (made,) = (base / "dist").glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("fastrec_kernels-")} == {"fastrec"}
    for part in ("_native", "_onnxruntime_ops"):
        assert any(name.startswith(f"fastrec/{part}.") and name.endswith(".so") for name in names)
    embedded = ("include/fastrec.h", "lib/libfastrec.so", "lib/cmake/fastrec/fastrec-config.cmake")
    assert not {f"fastrec/{name}" for name in embedded} - set(names)
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    base = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not [line for line in base if "torch" in line], "the base install pulls torch"
    assert "Requires-Python: >=3.10" in lines


def test_the_source_archive_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}",
         "sdist", f"--dist-dir={tmp_path}"],
        cwd=ROOT, env={**os.environ, "FASTREC_BUILD_CUDA": "0"},
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    suffixes = {".cpp", ".cu", ".cuh", ".h", ".map", ".cmake", ".py", ".pyi", ".binpb", ".proto",
                ".html", ".typed"}  # fmt: skip
    for folder in ("csrc", "src/fastrec"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes and path.parent.name != "include":  # a build's copy
                assert path.relative_to(ROOT).as_posix() in names, path
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


@pytest.mark.slow
def test_an_empty_environment_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    # No compiler is found, nor any variable that says where one is.
    environment = {"PATH": str(venv / "bin"), "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or "proxy" in k.lower()}
    assert shutil.which("cc", path=environment["PATH"]) is None
    done = subprocess.run(
        [venv / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check",
         "--only-binary=:all:", "-c", ROOT / "constraints.txt", f"{wheel}[serve]"],
        env={**environment, **kept}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode and any(sign in done.stderr for sign in UNREACHABLE):
        pytest.skip("numpy and the other requirements cannot be fetched: no package index reached")
    assert done.returncode == 0, done.stderr
    folder = write(tmp_path / "engine")
    smoke = [venv / "bin/python", "-I", HERE / "wheel_smoke.py", folder, "--serve"]
    done = subprocess.run(smoke, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

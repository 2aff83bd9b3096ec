"""Sections that run something: the build, the tests, compute-sanitizer, the tuning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.sheet import Sheet

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernels" / "gpu"


def build(sheet: Sheet) -> None:
    """The compiled parts, for this GPU alone, in place; without them the report goes on."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if major == 9 else f"{major}{minor}"
    env = os.environ | {"FASTREC_CUDA_ARCHS": arch}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e"]
    start = time.monotonic()
    found = _run([*pip, str(ROOT)], sheet, env)
    if found.returncode:  # an externally managed Python, no wheel: the extensions alone
        found = _run([sys.executable, "setup.py", "build_ext", "--inplace"], sheet, env)
    built = sorted(path.name for path in (ROOT / "src" / "fastrec").glob("_native*.so"))
    why = {} if not found.returncode else {"why": _last_line(found.stderr or found.stdout)}
    took = {"seconds": time.monotonic() - start}
    sheet.add(what=f"build for sm_{arch}", engine="fastrec", built=built, **took, **why)


def tests(sheet: Sheet) -> None:
    """The tests of the GPU kernels, the files side by side: on the GPU, or a few interpreted."""
    files = [*TESTS.glob("test_*_triton.py"), *TESTS.glob("test_*_cuda.py")]
    files += [TESTS / f"test_{name}.py" for name in ("arrays", "cuda_build", "tuning")]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    chosen: list[str] = []
    if not sheet.gpu:
        files = [TESTS / "test_ranker_triton.py"]
        chosen, env = ["-k", "precision or refused"], env | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-W", "default"]  # other versions of torch and triton warn of other things
    # Compiling is what takes the time, and that is done on the CPU.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        runs = {f.stem: pool.submit(_run, [*command, *chosen, str(f)], sheet, env) for f in files}
        for name, run in runs.items():
            found = run.result()
            counts = {
                key: len(re.findall(rf" {key.upper()} ", found.stdout))
                for key in ("passed", "failed", "error", "skipped")
            }
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", found.stdout, re.MULTILINE)
            why = {} if not found.returncode else {"why": _last_line(found.stdout)}
            sheet.add(what=f"tests, {name}", engine="pytest", **counts, failures=failed[:20], **why)


def sanitize(sheet: Sheet) -> None:
    """compute-sanitizer over the launches of the CUDA C++ tests: memory, then races."""
    name = "compute-sanitizer"
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")]
    tool = shutil.which(name, path=os.pathsep.join(folders))
    if tool is None:
        sheet.add(what=name, engine=name, why="there is no compute-sanitizer in CUDA_HOME or PATH")
        return
    # torch's allocator would hide what lies behind a tensor.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # A handful of samples, rows and inputs on edges, each in all configurations.
    chosen = "on_a_gpu and (M13-N40-K70 or M9-N70 or M7-N48 or 2of4)"
    pytest = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-k", chosen]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "86", *pytest]
        command += map(str, TESTS.glob("test_*_cuda.py"))
        found = _run(command, sheet, env, seconds=sheet.left() / (2 if check == "memcheck" else 1))
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", found.stdout)
        why = {} if not found.returncode else {"why": _last_line(found.stdout + found.stderr)}
        sheet.add(what=f"{name} {check}", engine=name, summary=summary[-1:], **why)


def tune(sheet: Sheet) -> None:
    """``fastrec tune``; what it found goes into the report's folder."""
    code = "from fastrec.cli import main; main()"
    file = sheet.out / "tuned.json"
    found = _run([sys.executable, "-c", code, "tune", "--json", str(file)], sheet, dict(os.environ))
    why = {} if not found.returncode else {"why": _last_line(found.stderr or found.stdout)}
    sheet.add(what="fastrec tune", engine="fastrec", written=file.is_file(), **why)


def _run(
    command: list[str], sheet: Sheet, env: dict[str, str], seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """With what it said up to its end, or up to the end of its time."""
    limit = max(1.0, sheet.left() - 2 if seconds is None else seconds - 2)
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = process.communicate(timeout=limit)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        code, out = 124, out + f"\ncut off after {limit:.0f} s\n"
    sys.stdout.write(f"$ {' '.join(command)}\n{out[-20000:]}{err[-4000:]}\n")
    return subprocess.CompletedProcess(command, code, out, err)


def _last_line(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a message"

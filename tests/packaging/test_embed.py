"""The engine in C and C++ programs: the examples compile, and give the scores that Python gives."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from small_engine import write

import fastrec
from fastrec.errors import BackendError
from fastrec.info import c_flags
from fastrec.kernels._compiled import reason_missing
from fastrec.models import SASRec, SASRecConfig
from fastrec.runtime import load_engine
from fastrec.runtime.engine import Engine

EXAMPLES = Path(__file__).parents[2] / "examples/embed"
pytestmark = [
    pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing())),
    pytest.mark.skipif(not (shutil.which("cc") and shutil.which("c++")), reason="no C compiler"),
]


def run(*command: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both examples, compiled with every warning an error."""
    folder = tmp_path_factory.mktemp("programs")
    strict = ("-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1")
    flags = shlex.split(c_flags())
    run("cc", "-std=c11", *strict, EXAMPLES / "score.c", *flags, "-o", folder / "score")
    source = EXAMPLES / "user_state.cpp"
    run("c++", "-std=c++17", *strict, source, *flags, "-o", folder / "user_state")
    return folder


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ranker")) / "ranker.engine"


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = SASRec(SASRecConfig(90, 41, d=32)).eval()
    inputs = (torch.ones(2, 30, dtype=torch.int64), torch.tensor([30, 17]))
    engine = fastrec.compile(model, inputs, "native", threads=2, fallback="error")
    return engine.save(tmp_path_factory.mktemp("sasrec") / "sasrec.engine")


def request(engine: Engine, **sizes: int) -> list[np.ndarray]:
    """The arrays that the examples fill."""
    arrays = []
    for index, field in enumerate(engine.spec.fields):
        shape = [sizes[d] if isinstance(d, str) else d for d in field.dims]
        count = np.arange(np.prod(shape)).reshape(shape)
        values = count * 7 + index + 1
        if isinstance(field.rows, str):
            arrays.append(np.full(shape, sizes[field.rows]))
        else:
            arrays.append(values % field.rows)
    return arrays


def numbers(output: str) -> np.ndarray:
    """The lines that are one number."""
    lines = (line for line in output.splitlines() if line.strip("-+.e0123456789") == "" and line)
    return np.array([np.float32(line) for line in lines])


def test_scores_in_c_are_pythons_to_the_bit(programs: Path, ranker: Path) -> None:
    with load_engine(ranker) as engine:
        for batch in (1, 3):
            told = run(programs / "score", ranker, str(batch)).stdout
            expected = engine(*request(engine, B=batch, L=7, m=7))
            np.testing.assert_array_equal(numbers(told), expected.ravel())
        assert f"input item dtype 1 [B={batch}, L=7] ids below 300" in told


def test_an_id_beyond_its_table_is_a_code_and_a_sentence(programs: Path, ranker: Path) -> None:
    told = run(programs / "score", ranker).stdout
    assert told.splitlines()[-1] == "refused: item: expected values in 0..299, got one outside"


def test_states_in_cpp_are_pythons_to_the_bit(programs: Path, ranker: Path, sasrec: Path) -> None:
    with load_engine(ranker) as engine:
        arrays = request(engine, B=2, L=7, m=5)
        expected = engine.score(engine.encode(*arrays[:4]), *arrays[4:])  # type: ignore[attr-defined]
    told = run(programs / "user_state", ranker).stdout
    np.testing.assert_array_equal(numbers(told), expected.ravel())

    with load_engine(sasrec) as engine:
        state = engine.encode(  # type: ignore[attr-defined]
            *request(engine, B=2, L=7), candidates=(), appendable=True
        )
        state = engine.append(state, request(engine, B=2, L=2)[0])  # type: ignore[attr-defined]
    told = run(programs / "user_state", sasrec).stdout
    np.testing.assert_array_equal(numbers(told), state.output.ravel())


@pytest.mark.parametrize("program", ["score", "user_state"])
def test_what_is_no_engine_is_a_code(programs: Path, program: str, tmp_path: Path) -> None:
    for name, content in (("missing", None), ("foreign", b"x" * 999)):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        told = run(programs / program, path, code=1).stderr
        assert "code 4: " in told
        assert str(path) in told


def test_only_the_c_functions_are_visible_and_none_is_pythons() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    header = (Path(fastrec.__file__).parent / "include/fastrec.h").read_text()
    library = Path(fastrec.__file__).parent / "lib/libfastrec.so"
    visible = {
        line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()
    }
    assert visible
    assert {name for name in visible if f" {name}(" not in header} == set()
    undefined = run("nm", "-D", "--undefined-only", library).stdout
    assert " Py" not in undefined
    assert "_Py" not in undefined


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_finds_the_library(ranker: Path, programs: Path, tmp_path: Path) -> None:
    package = Path(fastrec.__file__).parent
    run("cmake", "-S", EXAMPLES, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={package}")
    run("cmake", "--build", tmp_path)
    told = run(tmp_path / "score", ranker, "2").stdout
    assert told == run(programs / "score", ranker, "2").stdout


def test_flags_without_a_library_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastrec, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BackendError, match=r"no libfastrec\.so"):
        c_flags()

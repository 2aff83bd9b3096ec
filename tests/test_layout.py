"""The tree keeps its promises: one op id in every folder, rooms import only to their left."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fastrec import kernels

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fastrec"
# Each room may import itself and the rooms before it.
ROOMS = (
    "kernels",
    "data",
    "nn",
    "models",
    "train",
    "compress",
    "measure",
    "exporters",
    "runtime",
    "search",
    "serving",
    "report",
)


@pytest.mark.parametrize("op_id", kernels.OP_IDS)
def test_every_op_has_its_anatomy(op_id: str) -> None:
    python, native = SOURCE / "kernels" / op_id, ROOT / "csrc" / "cpu" / op_id
    for path in (
        python / "__init__.py",
        python / "reference.py",
        native / f"{op_id}.h",
        native / "scalar.cpp",
        native / "dispatch.cpp",
        native / "bind.cpp",
    ):
        assert path.is_file(), path
    assert len((python / "reference.py").read_text().splitlines()) <= 100
    rivals = ROOT / "bench" / "rivals" / f"{op_id}.py"
    assert "def rivals(" in rivals.read_text(), f"{rivals}: what the bench holds the op against"
    assert f"{op_id}::bind(m);" in (ROOT / "csrc/cpu/module.cpp").read_text()


def test_no_op_is_left_out_of_the_registry() -> None:
    folders = {path.parent.name for path in (SOURCE / "kernels").glob("*/reference.py")}
    assert folders == set(kernels.OP_IDS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_to_their_left(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) | {"errors", "env", "files", "spec"}
    if room == "kernels":
        allowed = {"kernels", "errors", "env", "files"}
    offenders = []
    for path in (SOURCE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "fastrec":
                    names = [f"fastrec.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                match = re.match(r"fastrec\.(\w+)", name)
                if match and match[1] in ROOMS and match[1] not in allowed:
                    offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not offenders


def test_the_compiled_part_knows_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        includes = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if "torch" in name or "ATen" in name], path
        if path.stem not in ("bind", "module"):
            assert not [name for name in includes if "pybind11" in name], path


def test_only_one_module_reads_the_environment() -> None:
    readers = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if re.search(r"os\.(environ|getenv)", path.read_text())
    }
    assert readers <= {"env.py"}


def test_a_step_kind_is_one_file_and_one_line() -> None:
    engine = ROOT / "csrc" / "cpu" / "engine"
    listed = re.findall(r"X\((\w+)\)\s*\\?$", (engine / "steps" / "kinds.h").read_text(), re.M)
    sources = {path.stem: path.read_text() for path in (engine / "steps").glob("*.cpp")}
    defined = {stem for stem, text in sources.items() if f"Kind {stem}_kind()" in text}
    assert len(listed) == len(set(listed))
    assert set(listed) == defined
    # Causal kinds become resumed_attention where histories are taken further, and copies are maps.
    allowed = {"resumed_attention", "attention", "map"}
    for path in engine.glob("*.cpp"):
        named = {kind for kind in listed if f'"{kind}"' in path.read_text()}
        assert named <= (allowed if path.name == "split.cpp" else set()), path.name

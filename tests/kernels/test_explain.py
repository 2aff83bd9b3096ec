"""``fastrec explain --op``: which kernel runs, and why the others do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fastrec import kernels
from fastrec.errors import ArgumentError
from fastrec.info import explain, explain_op, info
from fastrec.kernels._compiled import reason_missing

RUNNER = CliRunner()

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


@pytest.mark.parametrize("op_id", kernels.OP_IDS)
def test_every_instruction_set_has_its_answer(op_id: str) -> None:
    rows = {row["isa"]: row for row in explain_op(op_id) if row["backend"] == "cpu"}
    assert list(rows) == kernels.isa_names()[::-1]
    for name, row in rows.items():
        if name in kernels.available_isas():
            assert kernels.isa_names().index(row["runs"]) <= kernels.isa_names().index(name)
        else:
            assert row["runs"] == "no"
            assert "lacks it" in row["why"]
    assert rows["scalar"]["runs"] == "scalar"
    assert rows[kernels.active_isa()]["why"].startswith("chosen: the newest here")


def test_a_forced_ceiling_shows() -> None:
    with kernels.force_isa("scalar"):
        rows = {row["isa"]: row for row in explain_op("padded_attention")}
    assert rows["scalar"]["why"].startswith("chosen: forced")


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(explain)
    app.command()(info)
    return app


def test_command_line(tmp_path: Path, app: typer.Typer) -> None:
    target = tmp_path / "op.json"
    done = RUNNER.invoke(app, ["explain", "--op", "int8_embedding", "--json", str(target)])
    assert done.exit_code == 0, done.output
    assert "reference" in done.output
    assert json.loads(target.read_text()) == explain_op("int8_embedding")


def test_unknown_ops_and_both_or_neither_are_refused(app: typer.Typer) -> None:
    with pytest.raises(ArgumentError, match=r"op: expected one of .*got gemm"):
        explain_op("gemm")
    for arguments in (["explain"], ["explain", "folder", "--op", "int8_embedding"]):
        assert RUNNER.invoke(app, arguments).exit_code != 0

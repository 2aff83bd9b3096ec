"""Plans with several outputs: the parts of a model between torch ops."""

from __future__ import annotations

import numpy as np
import pytest

from fastrec.errors import ArtifactError, BackendError
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime import load_engine
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Buffer, Extent
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.program import Program
from fastrec.spec import InputField, InputSpec

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

USERS, WIDTH = Extent(1, ("B",)), Extent(4)


def program() -> Program:
    """Twice the input, its whole part, whether that is above 1, and twice the input once more."""
    x = Buffer("float32", (USERS, WIDTH), "input")
    twice, again = (Buffer("float32", (USERS, WIDTH)).view() for _ in range(2))
    whole = Buffer("int64", (USERS, WIDTH)).view()
    above = Buffer("bool", (USERS, WIDTH)).view()
    double = [("number", 2.0), ("mul_f32", 0, 1)]
    made = [
        steps.map(x=[x.view()], y=twice, program=double),
        steps.map(x=[twice], y=whole, program=[("to_i64", 0)]),
        steps.map(x=[whole], y=above, program=[("integer", 1), ("lt_i64", 1, 0)]),
        steps.map(x=[x.view()], y=again, program=double),
    ]
    return Program(("B",), [x], made, [twice, whole, above, again])


def built(of: Program) -> PlanEngine:
    spec = InputSpec((InputField("x", ("B", 4), "float32"),), {"B": (1, None)})
    return PlanEngine.build(
        of, backend="native", precision="fp32", threads=2, spec=spec, rows=[], versions={}
    )


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_output_in_its_dtype(batch: int, threads: int) -> None:
    engine = built(program())
    x = np.random.default_rng(batch).standard_normal((batch, 4), np.float32)
    twice, whole, above, again = engine.results((x,), threads)
    np.testing.assert_array_equal(twice, x * 2)
    np.testing.assert_array_equal(whole, (x * 2).astype(np.int64))
    np.testing.assert_array_equal(above, whole > 1)
    np.testing.assert_array_equal(again, twice)
    assert [r.dtype.name for r in (twice, whole, above)] == ["float32", "int64", "bool"]
    assert len(engine.profile((x,))) == 4


def test_inputs_that_do_not_fit_are_refused() -> None:
    engine = built(program())
    for bad in (np.ones((2, 5), np.float32), np.ones((2, 4)), np.full((2, 4), np.nan, np.float32)):
        with pytest.raises(BackendError, match="inputs of"):
            engine.results((bad,), 1)


def test_outputs_have_memory_of_their_own() -> None:
    of = program()
    of.outputs[3] = of.outputs[0]
    with pytest.raises(BackendError, match="outputs that are whole buffers"):
        built(of)


def test_outputs_that_nothing_computes() -> None:
    of = program()
    of.outputs[3] = Buffer("float32", (USERS, WIDTH)).view()
    with pytest.raises(BackendError, match="an output that is computed"):
        built(of)


def test_more_outputs_than_an_engine_holds() -> None:
    of = program()
    of.outputs += [Buffer("float32", (USERS, WIDTH)).view() for _ in range(40)]
    with pytest.raises(BackendError, match="at most 32"):
        built(of)


def test_no_file_and_no_split(tmp_path) -> None:
    """Files, and engines in other languages, give scores: one float32 output."""
    engine = built(program())
    with pytest.raises(BackendError, match="runs as a whole"):
        engine.encode(np.ones((1, 4), np.float32), candidates=())
    path = engine.save(tmp_path / "several.engine")
    with pytest.raises(ArtifactError, match="one float32 output"):
        load_engine(path)

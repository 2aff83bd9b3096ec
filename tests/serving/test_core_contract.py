"""A core end to end on an engine of its own: what the edges build on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fastrec.serving.core import InferenceCore, Kind, Rejected, Request, RequestDone
from fastrec.spec import InputField, InputSpec

SPEC = InputSpec(
    (InputField("user", ("B", 2), rows=100), InputField("candidate", ("B", "m"), rows=100)),
    {"B": (1, 64), "m": (1, 500)},
)


class Doubling:
    """Scores each candidate apart: twice its id plus the user's."""

    spec = SPEC

    def __call__(self, user: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        return (2 * candidate + user.sum(1, keepdims=True)).astype(np.float32)


def request(**changes: Any) -> Request:
    inputs = {"user": np.array([[1, 2]]), "candidate": np.array([[5, 6, 7]])}
    return Request(**{"model": "ranker", "version": "", "inputs": inputs, **changes})


def test_a_request_is_answered_and_told() -> None:
    async def main() -> None:
        core = InferenceCore()
        events: list[Any] = []

        class Log:
            def on_event(self, event: Any) -> None:
                events.append(event)

        core.subscribe(Log())
        info = await core.load("ranker", Doubling)
        assert info.state == "READY"
        assert core.ready("ranker")
        response = await core.infer(request(id="r1"))
        np.testing.assert_array_equal(response.outputs["scores"], [[13.0, 15.0, 17.0]])
        assert (response.model, response.version) == ("ranker", "1")
        assert [e.outcome for e in events if isinstance(e, RequestDone) and e.id == "r1"] == ["ok"]
        assert await core.drain()
        await core.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model": "other"}, Kind.NOT_FOUND),
        ({"version": "9"}, Kind.NOT_FOUND),
        ({"inputs": {"user": np.array([[1, 2]])}}, Kind.INVALID),
        (
            {"inputs": {"user": np.array([[1, 2]]), "candidate": np.array([[100]])}},
            Kind.INVALID,
        ),
    ],
)
def test_what_is_wrong_has_a_kind(changes: dict[str, Any], kind: Kind) -> None:
    async def main() -> None:
        core = InferenceCore()
        await core.load("ranker", Doubling)
        with pytest.raises(Rejected) as raised:
            await core.infer(request(**changes))
        assert raised.value.kind is kind
        await core.close()

    asyncio.run(main())


def test_the_core_imports_neither_torch_nor_grpc() -> None:
    code = "import fastrec.serving.core, sys; assert not {'torch', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)

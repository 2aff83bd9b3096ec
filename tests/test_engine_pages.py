"""The starts of docs/engines run as they stand, in their order, wherever the engine can run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastrec.runtime import BACKENDS, available_backends

PAGES = Path(__file__).parents[1] / "docs" / "engines"
# Marked as `py`: they need a GPU or a phone.
RUN = {"native", "torch", "onnxruntime", "openvino"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUN))
def test_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := available_backends()[name]) is not None:
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    page = PAGES / f"{name}.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # our own page
    assert names["engine"].backend == name


def test_every_engine_has_a_page_that_says_what_to_install() -> None:
    for name in BACKENDS:
        page = PAGES / f"{name.removesuffix('_compile')}.md"
        assert "pip install" in page.read_text(), page

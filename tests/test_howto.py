"""The how-to's code blocks run as they stand, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastrec.kernels._compiled import reason_missing

PAGE = Path(__file__).parents[1] / "docs" / "howto_compress.md"


@pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
def test_the_howto_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {"__name__": "howto"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # our own page
    assert names["pruned"].sparsity > 0.35
    assert names["report"].tables == ["items"]
    assert names["tuned"].chosen.size_mb <= 0.15

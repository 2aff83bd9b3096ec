"""The README's Python runs as it stands, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastrec.kernels._compiled import reason_missing

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # our own page
    assert names["scores"].shape == (16,)
    assert (tmp_path / "bst.engine").is_file()
    assert names["engine"].precision == "int8"

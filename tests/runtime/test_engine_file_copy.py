"""An engine that keeps a private copy of its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastrec
from fastrec.errors import ArgumentError
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime import load_engine

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def test_a_file_overwritten_or_cut_in_place_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Weights of many pages, so that a mapping would see what is cut.
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    x = torch.randn(3, 64)
    path = fastrec.compile(model, (x,), "native", fallback="error").save(tmp_path / "engine")
    with load_engine(path, copy=True) as engine, load_engine(path) as mapped:
        expected = mapped(x.numpy())
        np.testing.assert_array_equal(engine(x.numpy()), expected)
        mapped.close()
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(b"\x7f" * size)
        np.testing.assert_array_equal(engine(x.numpy()), expected)
        with path.open("r+b") as file:
            file.truncate(0)
        np.testing.assert_array_equal(engine(x.numpy()), expected)
        assert engine.save(tmp_path / "again").stat().st_size == size


def test_only_native_engines_are_copied(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text(
        '{"format": "fastrec-engine", "version": 1, "backend": "openvino", "files": {}}'
    )
    with pytest.raises(ArgumentError, match="copy"):
        load_engine(tmp_path, copy=True)

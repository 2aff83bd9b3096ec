"""Writes a small engine, a request and its scores: what ``wheel_smoke.py`` asks an installed wheel.

    python tests/packaging/small_engine.py FOLDER

Needs torch; the wheel's own environment has none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import fastrec
from fastrec.exporters.model_spec import spec_of
from fastrec.models import Ranker, RankerConfig


def write(folder: Path) -> Path:
    """Make ``folder`` with ``ranker.engine``, ``request.npz`` and ``scores.npy``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = RankerConfig(
        n_items=300, n_categories=20, history_length=12, d=32, category_dim=8, n_blocks=1,
        n_heads=2, ffn=64, tower=(64, 64),
    )  # fmt: skip
    model = Ranker(config).eval()
    spec = spec_of(model, ())
    calibration = [spec.sample({"B": 8, "m": 20}, seed=seed) for seed in range(4)]
    fastrec.quantize_(model, fastrec.Int8(), calibration=calibration)
    engine = fastrec.compile(model, calibration[0], "native", settings={"executor": "plan"})
    engine.save(folder / "ranker.engine")
    request = spec.sample({"B": 3, "m": 7}, seed=9)
    np.savez(folder / "request.npz", **dict(zip(spec.names, request, strict=True)))
    np.save(folder / "scores.npy", engine(*request))
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""A tiny ranker whose scores spread, and requests for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastrec.exporters.model_spec import spec_of
from fastrec.models import Ranker, RankerConfig

M = 16


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """A cache of the test's own: no choice or plan of another test or user."""
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "fastrec-cache"))


@pytest.fixture(scope="session")
def ranker() -> Ranker:
    config = RankerConfig(
        n_items=300,
        n_categories=30,
        history_length=12,
        d=16,
        category_dim=8,
        n_heads=2,
        ffn=32,
        tower=(32, 32),
    )
    torch.manual_seed(0)
    return Ranker(config).eval()


@pytest.fixture
def request_of(ranker):
    """(B, seed, L) -> one request as numpy arrays."""

    def make(batch: int, seed: int = 0, length: int = 12) -> tuple[np.ndarray, ...]:
        return spec_of(ranker, ()).sample({"B": batch, "L": length, "m": M}, seed=seed)

    return make


@pytest.fixture
def expected(ranker):
    """Scores of the torch model for a request of numpy arrays."""

    def run(request: tuple[np.ndarray, ...]) -> np.ndarray:
        with torch.inference_mode():
            return ranker(*map(torch.from_numpy, request)).numpy()

    return run

"""Requests as tritonclient makes them."""

from __future__ import annotations

import numpy as np
import pytest

tritonclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def arrays(users=2, length=12, candidates=5):
    rng = np.random.default_rng(0)
    return {
        "item": rng.integers(0, 50, (users, length)),
        "length": np.full(users, length),
        "cand_item": rng.integers(0, 50, (users, candidates)),
    }


def inputs(values):
    made = []
    for name, array in values.items():
        kind = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}[array.dtype.name]
        tensor = tritonclient.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made

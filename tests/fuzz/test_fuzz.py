"""Random graphs on each engine against torch.

A failing graph is written as a script that runs by itself. By hand, for an hour from another seed:
``FASTREC_FUZZ=native:3600:7 python -m pytest -s tests/fuzz``.
"""

from __future__ import annotations

import os
import sys

import pytest
from differ import run

from fastrec.runtime import available_backends

# Models of six graphs each.
_MODELS = {"native": 5, "onnxruntime": 1, "openvino": 1}


@pytest.mark.slow
@pytest.mark.parametrize("backend", _MODELS)
def test_engines_are_right_or_refuse(backend: str) -> None:
    if (reason := available_backends()[backend]) is not None:
        pytest.skip(reason)
    by_hand, models, seconds, seed = os.environ.get("FASTREC_FUZZ"), _MODELS[backend], 1e9, 1
    if by_hand is not None:
        name, limit, first = by_hand.split(":")
        if name != backend:
            pytest.skip(f"by hand: {name} alone")
        models, seconds, seed = sys.maxsize, float(limit), int(first)
    tally = run(backend, seed, models=models, seconds=seconds)
    sys.stderr.write(f"{tally}\n")
    assert not tally.failures, "\n\n".join(tally.failures)
    assert tally.right > 0.5 * tally.graphs, tally.refused

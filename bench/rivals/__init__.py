"""The rivals of each op: the same work, the same inputs, the same threads.

One module an op, ``rivals/<op_id>.py``:

``rivals(args, kwargs, threads) -> dict[str, Call]``
    The rivals' forward by name, weights prepacked, at their best settings.
``prepared(args, kwargs) -> Call`` (optional)
    Ours as a model runs it, its weight prepared once.
``kernel(args, kwargs) -> Call`` (optional)
    Our compiled kernel alone, into an output that is there: no rival's match, but what a share of
    the machine's peak or bandwidth, or a gain by threads, says something about.
``training(args, kwargs, threads) -> dict[str, Call]`` (optional)
    Forward and backward of "fastrec" and its rivals, if any; each returns (output, *gradients).
``trained(sample) -> bool`` (optional, with ``training``)
    Whether the bench trains on this sample; without it, on every one.
``value(output, args, kwargs) -> Tensor | tuple`` (optional)
    Any engine's output as the real numbers it stands for, so that engines can be compared; without
    it, tensors and arrays are taken as they are and quantised tensors dequantised.

The engine's name says its precision: "int8" or "bf16" in it, else fp32. A rival that answers
another question (attention over every key) says so by ``_common.other_work``: it is timed, and its
output is not compared.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fastrec.kernels._registry import Sample

# False leaves out what has to be compiled first (a quick run).
COMPILE = True


def load(op_id: str) -> ModuleType:
    """The op's module; an op without one is an error, not an op without rivals."""
    try:
        return importlib.import_module(f"{__name__}.{op_id}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{op_id}":
            raise
        raise LookupError(f"bench/rivals/{op_id}.py: every op of the registry needs one") from None


def modes(op_id: str, sample: Sample) -> list[str]:
    """The bench's modes for a sample: "forward", and "training" where the op has it."""
    module = load(op_id)
    trained = getattr(module, "trained", lambda sample: True)
    return ["forward", "training"][: 2 if hasattr(module, "training") and trained(sample) else 1]

"""The hand-written kernels, one folder per op id.

``fastrec.kernels.<op_id>(...)`` is the public function, ``fastrec.kernels.registry()`` lists the
ops. Importing this package loads neither torch nor the compiled kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrec.kernels._compiled import (
    active_isa,
    available_isas,
    force_isa,
    isa_names,
    num_threads,
    set_num_threads,
)

if TYPE_CHECKING:
    from fastrec.kernels._registry import OpSpec
    from fastrec.kernels.int8_embedding import int8_embedding
    from fastrec.kernels.padded_attention import padded_attention
    from fastrec.kernels.sparse_int8_linear import PackedWeight, sparse_int8_linear

# One line per op.
OP_IDS = (
    "int8_embedding",
    "padded_attention",
    "sparse_int8_linear",
)

__all__ = [
    "OP_IDS",
    "PackedWeight",
    "active_isa",
    "available_isas",
    "force_isa",
    "int8_embedding",
    "isa_names",
    "num_threads",
    "padded_attention",
    "registry",
    "set_num_threads",
    "sparse_int8_linear",
]


def registry() -> dict[str, OpSpec]:
    """The spec of every op, by id. Imports torch."""
    return {op_id: importlib.import_module(f"{__name__}.{op_id}").SPEC for op_id in OP_IDS}


def __getattr__(name: str) -> Any:
    # An op's function shadows the subpackage of the same name once that is imported, so that
    # `fastrec.kernels.<op_id>` always means the function.
    if name == "PackedWeight":
        return importlib.import_module(f"{__name__}.sparse_int8_linear").PackedWeight
    if name in OP_IDS:
        function = getattr(importlib.import_module(f"{__name__}.{name}"), name)
        globals()[name] = function
        return function
    raise AttributeError(f"module 'fastrec.kernels' has no attribute {name!r}")

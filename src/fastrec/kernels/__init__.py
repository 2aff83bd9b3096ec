"""The hand-written kernels, one folder per op id.

``fastrec.kernels.<op_id>(...)`` is the public function, ``fastrec.kernels.registry()`` lists the
ops. Importing this package loads neither torch nor the compiled kernels.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastrec.kernels._compiled import (
    active_isa,
    available_isas,
    call_threads,
    force_isa,
    isa_names,
    num_threads,
    set_num_threads,
)

if TYPE_CHECKING:
    from fastrec.kernels._registry import OpSpec
    from fastrec.kernels.activation_quantize import activation_quantize
    from fastrec.kernels.attention_map_kl import attention_map_kl
    from fastrec.kernels.grouped_linear import grouped_linear
    from fastrec.kernels.int8_embedding import int8_embedding
    from fastrec.kernels.layer_norm_quantize import layer_norm_quantize
    from fastrec.kernels.padded_attention import padded_attention
    from fastrec.kernels.pointwise_attention import pointwise_attention
    from fastrec.kernels.pointwise_attention_int8 import pointwise_attention_int8
    from fastrec.kernels.separable_projection import separable_projection
    from fastrec.kernels.sparse_int8_linear import PackedWeight, sparse_int8_linear
    from fastrec.kernels.window_sparse_attention import window_sparse_attention
    from fastrec.kernels.window_sparse_attention_int8 import window_sparse_attention_int8

# One line per op.
OP_IDS = (
    "activation_quantize",
    "attention_map_kl",
    "grouped_linear",
    "int8_embedding",
    "layer_norm_quantize",
    "padded_attention",
    "pointwise_attention",
    "pointwise_attention_int8",
    "separable_projection",
    "sparse_int8_linear",
    "window_sparse_attention",
    "window_sparse_attention_int8",
)

__all__ = [
    "OP_IDS",
    "PackedWeight",
    "activation_quantize",
    "active_isa",
    "attention_map_kl",
    "available_isas",
    "call_threads",
    "force_isa",
    "grouped_linear",
    "int8_embedding",
    "isa_names",
    "layer_norm_quantize",
    "num_threads",
    "padded_attention",
    "pointwise_attention",
    "pointwise_attention_int8",
    "registry",
    "separable_projection",
    "set_num_threads",
    "sparse_int8_linear",
    "window_sparse_attention",
    "window_sparse_attention_int8",
]


def registry() -> dict[str, OpSpec]:
    """The spec of every op, by id. Imports torch."""
    return {op_id: importlib.import_module(f"{__name__}.{op_id}").SPEC for op_id in OP_IDS}


class _Package(ModuleType):
    """Makes ``fastrec.kernels.<op_id>`` the op's function, not the subpackage of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a subpackage, once it has run, with this very call.
        if name in OP_IDS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "PackedWeight":
        return importlib.import_module(f"{__name__}.sparse_int8_linear").PackedWeight
    if name in OP_IDS:
        importlib.import_module(f"{__name__}.{name}")
        return globals()[name]
    raise AttributeError(f"module 'fastrec.kernels' has no attribute {name!r}")

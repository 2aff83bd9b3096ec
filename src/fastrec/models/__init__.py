"""Recommendation models in plain torch. Torch is loaded on first use of a name, not on import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "EncoderConfig": "fastrec.models.encoder",
    "Ranker": "fastrec.models.ranker",
    "RankerConfig": "fastrec.models.ranker",
    "SASRec": "fastrec.models.sasrec",
    "SASRecConfig": "fastrec.models.sasrec",
    "fuse_attention_": "fastrec.models.attention",
    "record_attention": "fastrec.models.attention",
    "validate_inputs": "fastrec.models.validate",
}

if TYPE_CHECKING:
    from fastrec.models.attention import fuse_attention_, record_attention
    from fastrec.models.encoder import EncoderConfig
    from fastrec.models.ranker import Ranker, RankerConfig
    from fastrec.models.sasrec import SASRec, SASRecConfig
    from fastrec.models.validate import validate_inputs

    MODELS: dict[str, tuple[Any, Any]]

__all__ = [
    "MODELS",
    "EncoderConfig",
    "Ranker",
    "RankerConfig",
    "SASRec",
    "SASRecConfig",
    "fuse_attention_",
    "record_attention",
    "validate_inputs",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "MODELS":
        # What a saved checkpoint may name: its model's class and config class.
        from fastrec.models.ranker import Ranker, RankerConfig
        from fastrec.models.sasrec import SASRec, SASRecConfig

        models = {"ranker": (Ranker, RankerConfig), "sasrec": (SASRec, SASRecConfig)}
        globals()["MODELS"] = models
        return models
    raise AttributeError(f"module 'fastrec.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Recommendation models in plain torch. Torch is loaded on first use of a name, not on import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".attention": ("fuse_attention_", "record_attention"),
        ".encoder": ("EncoderConfig",),
        ".ranker": ("Ranker", "RankerConfig"),
        ".registry": ("MODELS",),
        ".sasrec": ("SASRec", "SASRecConfig"),
        ".validate": ("validate_inputs",),
    },
)

if TYPE_CHECKING:
    from fastrec.models.attention import fuse_attention_, record_attention
    from fastrec.models.encoder import EncoderConfig
    from fastrec.models.ranker import Ranker, RankerConfig
    from fastrec.models.registry import MODELS
    from fastrec.models.sasrec import SASRec, SASRecConfig
    from fastrec.models.validate import validate_inputs

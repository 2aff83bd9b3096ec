"""Models that a saved checkpoint may name."""

from __future__ import annotations

from typing import Any

from fastrec.models.ranker import Ranker, RankerConfig
from fastrec.models.sasrec import SASRec, SASRecConfig

# Name in the checkpoint -> class of the model, class of its configuration.
MODELS: dict[str, tuple[Any, Any]] = {
    "ranker": (Ranker, RankerConfig),
    "sasrec": (SASRec, SASRecConfig),
}

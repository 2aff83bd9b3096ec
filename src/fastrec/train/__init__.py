"""Training and evaluation. Torch is loaded on first use of a name, not on import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "DivergedError": "fastrec.train.loop",
    "Evaluation": "fastrec.train.metrics",
    "TrainConfig": "fastrec.train.config",
    "TrainReport": "fastrec.train.config",
    "autocast_dtype": "fastrec.train.precision",
    "bootstrap_ci": "fastrec.train.metrics",
    "evaluate": "fastrec.train.evaluation",
    "fit": "fastrec.train.loop",
    "load_model": "fastrec.train.checkpoint",
    "paired_difference": "fastrec.train.metrics",
    "paired_ratio": "fastrec.train.metrics",
    "ranker_loss": "fastrec.train.losses",
    "sasrec_loss": "fastrec.train.losses",
    "save_model": "fastrec.train.checkpoint",
}

if TYPE_CHECKING:
    from fastrec.train.checkpoint import load_model, save_model
    from fastrec.train.config import TrainConfig, TrainReport
    from fastrec.train.evaluation import evaluate
    from fastrec.train.loop import DivergedError, fit
    from fastrec.train.losses import ranker_loss, sasrec_loss
    from fastrec.train.metrics import Evaluation, bootstrap_ci, paired_difference, paired_ratio
    from fastrec.train.precision import autocast_dtype

__all__ = [
    "DivergedError",
    "Evaluation",
    "TrainConfig",
    "TrainReport",
    "autocast_dtype",
    "bootstrap_ci",
    "evaluate",
    "fit",
    "load_model",
    "paired_difference",
    "paired_ratio",
    "ranker_loss",
    "sasrec_loss",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastrec.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

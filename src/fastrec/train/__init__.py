"""Training and evaluation. Torch is loaded on first use of a name, not on import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".checkpoint": ("load_model", "save_model"),
        ".config": ("TrainConfig", "TrainReport"),
        ".evaluation": ("evaluate",),
        ".loop": ("DivergedError", "fit"),
        ".losses": ("ranker_loss", "sasrec_loss"),
        ".metrics": ("Evaluation", "bootstrap_ci", "paired_difference", "paired_ratio"),
        ".precision": ("autocast_dtype",),
    },
)

if TYPE_CHECKING:
    from fastrec.train.checkpoint import load_model, save_model
    from fastrec.train.config import TrainConfig, TrainReport
    from fastrec.train.evaluation import evaluate
    from fastrec.train.loop import DivergedError, fit
    from fastrec.train.losses import ranker_loss, sasrec_loss
    from fastrec.train.metrics import Evaluation, bootstrap_ci, paired_difference, paired_ratio
    from fastrec.train.precision import autocast_dtype

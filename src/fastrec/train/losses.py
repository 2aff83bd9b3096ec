"""Training losses: ``loss_fn(model, batch) -> scalar``; any callable of that form fits ``fit``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.models import RankerConfig, SASRec, validate_inputs
from fastrec.train.evaluation import to_tensors


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def ranker_loss(model: nn.Module, batch: Any) -> Tensor:
    """Softmax cross-entropy of the positive against its candidates.

    Args:
        model: anything that takes the six inputs and returns scores [B, m].
        batch: a :class:`fastrec.data.SequenceBatch`.

    Raises:
        IdRangeError, ShapeError, DtypeError: the batch does not fit the model's config.
    """
    device = model_device(model)
    inputs = to_tensors(batch.inputs(), device)
    config = getattr(model, "config", None)
    if isinstance(config, RankerConfig):
        validate_inputs(config, *inputs)
    return F.cross_entropy(model(*inputs).float(), to_tensors([batch.label], device)[0])


def sasrec_loss(model: SASRec, batch: Any) -> Tensor:
    """Softmax cross-entropy of the next item over the whole catalogue, at every position.

    Args:
        model: a SASRec.
        batch: (item [B, L], length [B], target [B, L]) int64 arrays; target 0 = nothing to predict.

    Raises:
        IdRangeError, ShapeError, DtypeError: the batch does not fit the model's config.
    """
    item, length, target = to_tensors(batch, model_device(model))
    validate_inputs(model.config, item, length)
    wanted = target > 0
    return F.cross_entropy(model.logits(model(item, length)[wanted]).float(), target[wanted])


def default_loss(model: nn.Module) -> Any:
    """The loss of a model's kind."""
    return sasrec_loss if isinstance(model, SASRec) else ranker_loss

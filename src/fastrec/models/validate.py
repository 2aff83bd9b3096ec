"""Input checks for engines and training, kept out of the models' forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrec.errors import ArgumentError, DeviceError, DtypeError, IdRangeError, ShapeError
from fastrec.models.ranker import RankerConfig
from fastrec.models.sasrec import SASRecConfig

RANKER_INPUTS = ("item", "category", "behaviour", "length", "cand_item", "cand_category")
SASREC_INPUTS = ("item", "length")


def validate_inputs(config: RankerConfig | SASRecConfig, *inputs: Tensor) -> None:
    """Check the inputs of a model before anything is computed.

    Args:
        config: the model's config.
        inputs: the tensors of its forward, in order: (item, category, behaviour, length, cand_item,
            cand_category) for a :class:`Ranker`, (item, length) for a :class:`SASRec`.

    Raises:
        ArgumentError: the wrong number of inputs.
        DtypeError: an input is not an int64 tensor.
        ShapeError: a rank or size does not fit the others or the config.
        DeviceError: inputs on different devices.
        IdRangeError: an id outside its table, or a length outside 0..L.
    """
    ranker = isinstance(config, RankerConfig)
    names = RANKER_INPUTS if ranker else SASREC_INPUTS
    if len(inputs) != len(names):
        raise ArgumentError("inputs", f"{len(names)} tensors {names}", f"{len(inputs)} tensors")
    for name, tensor in zip(names, inputs, strict=True):
        if not isinstance(tensor, Tensor):
            raise DtypeError(name, "an int64 tensor", type(tensor).__name__)
        if tensor.dtype != torch.int64:
            raise DtypeError(name, "an int64 tensor", tensor.dtype)
        if tensor.device != inputs[0].device:
            raise DeviceError(name, f"the device of item ({inputs[0].device})", tensor.device)
        rank = 1 if name == "length" else 2
        if tensor.ndim != rank:
            shape = "[B]" if rank == 1 else "[B, m]" if name.startswith("cand") else "[B, L]"
            raise ShapeError(name, f"shape {shape}", f"shape {list(tensor.shape)}")
    by_name = dict(zip(names, inputs, strict=True))
    batch, size = by_name["item"].shape
    limit = config.history_length if isinstance(config, RankerConfig) else config.max_length
    if not 1 <= size <= limit:
        raise ShapeError("item", f"shape [B, L] with L in 1..{limit}", f"shape [{batch}, {size}]")
    for name, tensor in by_name.items():
        if name == "length":
            expected: tuple[int, ...] = (batch,)
        elif name == "cand_item":
            if tensor.shape[1] < 1:
                raise ShapeError(name, "at least one candidate", f"shape {list(tensor.shape)}")
            expected = (batch, tensor.shape[1])
        elif name == "cand_category":
            expected = (batch, by_name["cand_item"].shape[1])
        else:
            expected = (batch, size)
        if tuple(tensor.shape) != expected:
            raise ShapeError(name, f"shape {list(expected)}", f"shape {list(tensor.shape)}")
    if batch == 0:
        return
    rows = {"item": config.n_items, "cand_item": config.n_items, "length": size + 1}
    if isinstance(config, RankerConfig):
        rows["category"] = rows["cand_category"] = config.n_categories
        rows["behaviour"] = config.n_behaviours + 1
    for name, tensor in by_name.items():
        low, high = torch.aminmax(tensor)
        if int(low) < 0 or int(high) >= rows[name]:
            kind = "lengths" if name == "length" else "ids"
            worst = int(low) if int(low) < 0 else int(high)
            raise IdRangeError(name, f"{kind} in 0..{rows[name] - 1}", worst)

"""Rivals of ``int8_embedding``: torch on the same int8 table, and on a float table four times as
large."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from rivals._common import Call


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    ids, table, scale = args
    column, real = scale[:, None], table.float() * scale[:, None]
    return {
        "torch int8 rows x scale": lambda: F.embedding(ids, table) * F.embedding(ids, column),
        "torch fp32 table": lambda: F.embedding(ids, real),
    }

"""Layers of public recommenders: recurrent, convolutions, pooling, batch norm, Fourier filters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from idioms import agrees, draw, ids
from torch import Tensor, nn

from fastrec.kernels._compiled import reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def sequences(batch: int) -> tuple[Tensor]:
    return (draw(batch, 9, 6, seed=batch),)


class Recurrent(nn.Module):
    """Every kind of cell: layers, directions, states given and read."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.deep = nn.GRU(6, 17, num_layers=2, bidirectional=True, batch_first=True, bias=False)
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True)
        self.tanh = nn.RNN(6, 4, batch_first=True)
        self.relu = nn.RNN(6, 4, batch_first=True, nonlinearity="relu")
        self.cell = nn.GRUCell(6, 5)

    def forward(self, x: Tensor) -> dict[str, object]:
        h = x[:, 0, :5].unsqueeze(0).contiguous()
        state = x[:, 0, :5]
        for step in range(3):
            state = self.cell(x[:, step], state)
        return {
            "gru": self.gru(x, h),
            "deep": self.deep(x),
            "lstm": self.lstm(x.transpose(0, 1))[0].transpose(0, 1),
            "cell": self.lstm(x.transpose(0, 1))[1][1].transpose(0, 1),
            "tanh": self.tanh(x)[0][:, -1],
            "relu": self.relu(x)[0],
            "cells": state,
        }


class First(nn.Module):
    """The state of all layers with the batch first, as a plan has to have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, object]:
        found = self.model(x)
        for name in ("gru", "deep"):
            rows, last = found[name]
            found[name] = (rows, last.transpose(0, 1))
        return found


def test_recurrent_layers() -> None:
    agrees(First(Recurrent()), sequences, batches=(3, 1, 14))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv1d(6, 5, 1)
        self.causal = nn.Conv1d(6, 6, 3, dilation=2)
        self.same = nn.Conv1d(6, 8, 3, padding=1, groups=2, stride=2)
        self.depthwise = nn.Conv1d(6, 6, 3, padding="same", groups=6, bias=False)
        self.horizontal = nn.Conv2d(1, 4, (3, 6))
        self.square = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        columns = x.transpose(1, 2)
        picture = x.unsqueeze(1)
        wide = F.relu(self.horizontal(picture).squeeze(3))
        return {
            "linear": self.linear(columns),
            "causal": self.causal(F.pad(columns, (4, 0))).transpose(1, 2),
            "same": self.same(columns),
            "depthwise": self.depthwise(columns),
            "max": F.max_pool1d(wide, wide.shape[2]).squeeze(2),
            "square": self.square(torch.stack([x, x * 2], 1)),
            "windows": F.max_pool1d(columns, 3, stride=2, padding=1),
            "average": F.avg_pool1d(columns, 3),
            "pictures": F.avg_pool2d(picture, 2) + F.max_pool2d(picture, (2, 2)),
        }


def test_convolutions_and_pooling() -> None:
    agrees(Convolutions(), sequences)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.BatchNorm1d(6)
        self.channels = nn.BatchNorm1d(9, affine=False)
        self.rms = nn.RMSNorm(6)
        self.linear = nn.Linear(6, 6)
        for norm in (self.rows, self.channels):
            norm.running_mean = draw(norm.num_features)
            norm.running_var = draw(norm.num_features).abs() + 0.5

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        gate = torch.sigmoid(self.rows(x[:, 0]))
        return {
            "rows": torch.relu(self.rows(self.linear(x[:, 0]))),
            "channels": self.channels(x),
            "dice": gate * x[:, 0] + (1 - gate) * x[:, 0] * 0.1,
            "rms": self.rms(x),
            "by hand": (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
        }


def test_norms() -> None:
    agrees(Norms(), sequences)


class Filters(nn.Module):
    """A learned filter of frequencies, for an even and an odd number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(draw(1, 5, 6, 2))
        self.even = nn.Parameter(draw(1, 5, 6, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        odd = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.odd)
        even = torch.fft.rfft(x[:, :8], dim=1) * torch.view_as_complex(self.even)
        return {
            "odd": torch.fft.irfft(odd, n=9, dim=1, norm="ortho"),
            "even": torch.fft.irfft(even, n=8, dim=1) + x[:, :8],
            "spectrum": torch.view_as_real(torch.fft.rfft(x, dim=-1)),
        }


def test_fourier_filters() -> None:
    agrees(Filters(), sequences)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.EmbeddingBag(30, 7, mode="sum")
        self.means = nn.EmbeddingBag(30, 7, mode="mean")

    def forward(self, item: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"sums": self.sums(item, per_sample_weights=weight), "means": self.means(item)}


def test_bags_of_ids() -> None:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return ids(30, batch, 4, seed=batch), draw(batch, 4, seed=batch)

    agrees(Bags(), inputs)

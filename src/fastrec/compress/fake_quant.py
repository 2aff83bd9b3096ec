"""Fake-quantised linear layers and embeddings for QAT: quantised in the forward pass, trained in
full precision.

The forward pass rounds as the INT8 modules do (paper, III-B: s = (max - min) / (2^b - 1),
w_q = clip(round(w / s) s, min, max)); the backward pass lets gradients through unchanged inside the
range and stops them outside (straight-through estimator). State-dict keys are those of the float
modules plus ``x_min`` and ``x_max``. Weights that are zero when a module is made or loaded stay
zero: pruning survives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.compress.layers import as_dense, output_order, weight_name, weight_of
from fastrec.compress.observers import affine_u8
from fastrec.compress.straight_through import round_input, round_weight
from fastrec.errors import ArgumentError
from fastrec.kernels.grouped_linear import grouped_linear
from fastrec.kernels.separable_projection.reference import valid_rows
from fastrec.nn import GroupedLinear, SeparableProjection
from fastrec.nn.separable_projection import depthwise_rows

WEIGHT_LEVELS = 127  # symmetric s8: -127 .. 127, so that -w is representable whenever w is


def row_scales(weight: Tensor, levels: int = WEIGHT_LEVELS) -> Tensor:
    """Symmetric s8 scale of each row, f32 [N]: absmax / levels; with 127 that is
    (max - min) / (2^8 - 2) of the symmetric range [-absmax, absmax]; 1 for a row of zeros."""
    peak = torch.linalg.vector_norm(weight.detach().float(), torch.inf, 1)
    return torch.where(peak > 0, peak / levels, torch.ones_like(peak))


class PruningMask(nn.Module):
    """Keeps pruned weights at zero: those that are exactly 0 when the module is made or loaded.

    A state dict holds the zeros, and so the mask: a resumed run keeps them, and a dense checkpoint
    has no mask. A weight that is zero throughout was never trained rather than pruned: no mask.
    """

    dropped: Tensor | None  # bool, the weight's shape
    _zeroed: tuple[int, int]  # the weight, and its version, whose pruned elements are zero

    def _mask_zeros(self) -> None:
        dropped = weight_of(self).detach() == 0
        some = bool(dropped.any()) and not bool(dropped.all())
        self.register_buffer("dropped", dropped if some else None, persistent=False)
        self._zeroed = (0, 0)

    def kept_weight(self) -> nn.Parameter:
        """The weight, in which pruned elements are set to zero again after an optimiser step.

        In place and once a step: a product with the mask in each forward and backward pass costs
        more than the rounding.
        """
        weight = weight_of(self)
        now = (id(weight), weight._version)
        if self.dropped is not None and now != self._zeroed:
            weight.detach().data.masked_fill_(self.dropped, 0.0)
            self._zeroed = now
        return weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.kept_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}{weight_name(self)}" in state_dict:
            self._mask_zeros()


class FakeQuant(PruningMask):
    """Base of the fake-quantised linear layers: the input's range and the weight's rounding.

    In training mode the range follows the batches' minimum and maximum by a moving average; in
    eval mode it is frozen. The first batch sets it, unless calibration did.
    """

    averaging: float
    levels: int  # the largest code of a weight
    x_min: Tensor
    x_max: Tensor
    bias: Tensor | None

    def _adopt(self, layer: nn.Module, averaging: float) -> None:
        """Share the parameters of ``layer``, so that optimisers made before stay valid."""
        self.averaging, self.levels = averaging, WEIGHT_LEVELS
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(self, name, parameter)
        weight = weight_of(self)
        self.register_buffer("x_min", torch.tensor(float("inf"), device=weight.device))
        self.register_buffer("x_max", torch.tensor(float("-inf"), device=weight.device))
        self._mask_zeros()
        self.train(layer.training)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the input range; scalars."""
        self.x_min.copy_(low)
        self.x_max.copy_(high)

    def input_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale f32 [] and zero point i32 [] of the input."""
        return affine_u8(self.x_min, self.x_max)

    def checked_qparams(self, name: str) -> tuple[Tensor, Tensor]:
        """:meth:`input_qparams`, or ArgumentError where no batch was seen or the range has NaN."""
        if bool(torch.isfinite(self.x_min) & torch.isfinite(self.x_max)):
            return self.input_qparams()
        seen = "no batch" if bool(torch.isinf(self.x_min)) else "NaN or infinity"
        raise ArgumentError(
            "model",
            "finite learned ranges: train the prepared model, or pass calibration to 'prepare'",
            f"{seen} at the input of {name!r}",
        )

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """The fake-quantised weight, in its shape, and the scales [N] of its rows of outputs."""
        weight = self.kept_weight()
        rows = weight.flatten(0, -2)
        scale = row_scales(rows, self.levels)
        dropped = None if self.dropped is None else self.dropped.flatten(0, -2)
        return round_weight(rows.float(), scale, dropped).view(weight.shape), scale

    def as_float(self) -> tuple[nn.Linear, Tensor]:
        """A float layer [N, K] that holds the fake-quantised weight, and its scales [N]: every
        w / s is an integer already, so packing cannot round it another way."""
        rounded, scale = self.quantized_weight()
        order = output_order(self)
        return as_dense(self, rounded), scale if order is None else scale[order]

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` rounded to its 256 levels; in training mode the range follows it first."""
        if self.training:
            self._follow(x.detach())
        scale, zero_point = self.input_qparams()
        return round_input(x.float(), scale, zero_point)

    def _follow(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.float())
        for bound, seen in ((self.x_min, low), (self.x_max, high)):
            moved = bound + self.averaging * (seen - bound)
            bound.copy_(torch.where(torch.isinf(bound), seen, moved))


class FakeQuantLinear(FakeQuant, nn.Linear):
    """nn.Linear with fake-quantised input (u8, learned range) and weight (s8 per output)."""

    @classmethod
    def twin_of(cls, linear: nn.Linear, averaging: float) -> FakeQuantLinear:
        """The fake-quantised ``linear``; it shares the parameters."""
        # On "meta": the float layer's own parameters are put in.
        sizes = (linear.in_features, linear.out_features)
        twin = cls(*sizes, bias=linear.bias is not None, device="meta")
        twin._adopt(linear, averaging)
        return twin

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(self.quantized_input(input), self.quantized_weight()[0], self.bias)


class FakeQuantGroupedLinear(FakeQuant, GroupedLinear):
    """GroupedLinear with fake-quantised input and weight."""

    @classmethod
    def twin_of(cls, layer: GroupedLinear, averaging: float) -> FakeQuantGroupedLinear:
        """The fake-quantised ``layer``; it shares the parameters."""
        sizes = (layer.in_features, layer.out_features, layer.groups)
        twin = cls(*sizes, layer.bias is not None, layer.shuffle, device="meta")
        twin._adopt(layer, averaging)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight = self.quantized_weight()[0]
        return grouped_linear(self.quantized_input(x), weight, self.bias, shuffle=self.shuffle)


class FakeQuantSeparableProjection(FakeQuant, SeparableProjection):
    """SeparableProjection whose projection has a fake-quantised input and weight; the taps stay
    float, as in :class:`~fastrec.nn.SeparableInt8Projection`."""

    @classmethod
    def twin_of(cls, layer: SeparableProjection, averaging: float) -> FakeQuantSeparableProjection:
        """The fake-quantised ``layer``; it shares the parameters."""
        sizes = (layer.in_features, layer.out_features, layer.kernel_size, layer.groups)
        twin = cls(*sizes, layer.bias is not None, layer.causal, device="meta")
        twin._adopt(layer, averaging)
        return twin

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x [B, L, K] -> [B, L, N]; see SeparableProjection."""
        hidden = depthwise_rows(x.float(), self.depthwise, lengths, self.causal)
        if lengths is not None:
            hidden = valid_rows(hidden, lengths)  # what is not read is not in the range
        weight = self.quantized_weight()[0]
        y = grouped_linear(self.quantized_input(hidden), weight, self.bias)
        return y if lengths is None else valid_rows(y, lengths)


def fake_quant_twin(layer: nn.Module, averaging: float, levels: int = WEIGHT_LEVELS) -> FakeQuant:
    """The fake-quantised version of one of ``layers.KINDS``."""
    twin: FakeQuant
    if isinstance(layer, GroupedLinear):
        twin = FakeQuantGroupedLinear.twin_of(layer, averaging)
    elif isinstance(layer, SeparableProjection):
        twin = FakeQuantSeparableProjection.twin_of(layer, averaging)
    else:
        assert isinstance(layer, nn.Linear)
        twin = FakeQuantLinear.twin_of(layer, averaging)
    twin.levels = levels
    return twin


class FakeQuantEmbedding(PruningMask, nn.Embedding):
    """nn.Embedding whose looked-up rows are fake-quantised (s8, one scale a row).

    Only the rows of the batch are rounded, so the cost does not grow with the table.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device="meta")
        self.levels = WEIGHT_LEVELS

    @classmethod
    def from_float(cls, table: nn.Embedding, levels: int = WEIGHT_LEVELS) -> FakeQuantEmbedding:
        """The fake-quantised ``table``; it shares the parameter."""
        twin = cls(table.num_embeddings, table.embedding_dim, table.padding_idx)
        twin.weight, twin.sparse = table.weight, table.sparse
        twin.scale_grad_by_freq = table.scale_grad_by_freq
        twin.levels = levels
        twin._mask_zeros()
        return twin.train(table.training)

    def as_float(self) -> nn.Embedding:
        """A float table with pruned elements zero."""
        table = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        table.weight = nn.Parameter(self.kept_weight().detach(), requires_grad=False)
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> rows [..., dim]."""
        rows = super().forward(input)
        if self.dropped is not None:
            rows = rows.masked_fill(self.dropped[input], 0.0)
        peak = rows.detach().abs().amax(-1, keepdim=True)
        scale = torch.where(peak > 0, peak / self.levels, torch.ones_like(peak))
        rounded = (rows.detach() / scale).round() * scale
        # Straight through: absmax sets the scale, so nothing is ever outside of the range.
        return rows + (rounded - rows.detach())

"""The packed INT8 weight: panels of 32 outputs that store only their kept groups of 4 inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels._gpu import ceil_div

PANEL_OUTPUTS = 32
GROUP_INPUTS = 4
GROUP_BYTES = PANEL_OUTPUTS * GROUP_INPUTS
# floor((2**31 - 1) / (255 * 128)): beyond, a sum of u8 x s8 products may overflow int32.
MAX_INPUTS = 65793


@dataclass(frozen=True)
class PackedWeight:
    """An s8 weight [N, K] with per-output scales, in the format of ``sparse_int8_linear.h``.

    Attributes:
        values: int8 [T, 128]; of each kept group, 32 outputs x 4 inputs.
        group_index: int32 [T]; first input of the group / 4.
        panel_start: int32 [ceil(N / 32) + 1]; panel p owns groups
            panel_start[p]:panel_start[p + 1].
        scale: float32 [N]; real weight = s8 weight * scale.
        sum: int32 [N]; sum of the s8 weights of each output (corrects for the input's zero point).
        outputs, inputs: N, K.
    """

    values: torch.Tensor
    group_index: torch.Tensor
    panel_start: torch.Tensor
    scale: torch.Tensor
    sum: torch.Tensor
    outputs: int
    inputs: int
    # Compiled handles of the public function, by epilogue. They borrow the parts' memory.
    _handles: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}

    def parts(self) -> tuple[torch.Tensor, ...]:
        """values, group_index, panel_start, scale and sum."""
        return self.values, self.group_index, self.panel_start, self.scale, self.sum

    def versions(self) -> tuple[int, ...] | None:
        """The parts' version counters, raised by in-place writes; None in inference mode."""
        try:
            return tuple(part._version for part in self.parts())
        except RuntimeError:  # tensors made in inference mode
            return None

    @staticmethod
    def pack(weight_s8: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
        """Packs an int8 weight [N, K]; groups of 32 x 4 that hold only zeros are dropped.

        Args:
            weight_s8: int8 [N, K].
            scale: float32 [N], finite and > 0.

        Raises:
            ShapeError, DtypeError, ArgumentError: see above; also K > 65,793, where an int32
                accumulator would not be exact.
        """
        if weight_s8.dtype != torch.int8:
            raise DtypeError("weight_s8", "int8", weight_s8.dtype)
        if weight_s8.dim() != 2 or 0 in weight_s8.shape:
            raise ShapeError("weight_s8", "shape [N, K], both > 0", list(weight_s8.shape))
        outputs, inputs = weight_s8.shape
        check_inputs(inputs)
        check_vector("scale", scale, outputs)
        if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise ArgumentError("scale", "finite values > 0", "a NaN, an infinity or a value <= 0")
        panels = ceil_div(outputs, PANEL_OUTPUTS)
        groups = ceil_div(inputs, GROUP_INPUTS)
        padded = torch.nn.functional.pad(
            weight_s8,
            (0, groups * GROUP_INPUTS - inputs, 0, panels * PANEL_OUTPUTS - outputs),
        )
        # [panels, groups, 32, 4]
        blocks = padded.view(panels, PANEL_OUTPUTS, groups, GROUP_INPUTS).transpose(1, 2)
        kept = (blocks != 0).any(-1).any(-1)  # [panels, groups]
        starts = torch.zeros(panels + 1, dtype=torch.int32, device=weight_s8.device)
        starts[1:] = kept.sum(1).cumsum(0)
        return PackedWeight(
            values=blocks[kept].reshape(-1, GROUP_BYTES).contiguous(),
            group_index=kept.nonzero()[:, 1].to(torch.int32).contiguous(),
            panel_start=starts,
            scale=scale.detach().to(torch.float32).contiguous(),
            sum=weight_s8.sum(1, dtype=torch.int32),
            outputs=outputs,
            inputs=inputs,
        )

    @staticmethod
    def from_parts(
        values: torch.Tensor,
        group_index: torch.Tensor,
        panel_start: torch.Tensor,
        scale: torch.Tensor,
        outputs: int,
        inputs: int,
    ) -> PackedWeight:
        """Rebuilds a packed weight from stored parts; checks every rule of the format.

        Args:
            values, group_index, panel_start, scale, outputs, inputs: as the attributes.

        Raises:
            ShapeError, DtypeError, ArgumentError: a part breaks the format.
        """
        check_inputs(inputs)
        panels = ceil_div(outputs, PANEL_OUTPUTS)
        for name, tensor, dtype in (
            ("values", values, torch.int8),
            ("group_index", group_index, torch.int32),
            ("panel_start", panel_start, torch.int32),
        ):
            if tensor.dtype != dtype:
                raise DtypeError(name, str(dtype), tensor.dtype)
        groups = len(group_index)
        if values.shape != (groups, GROUP_BYTES):
            raise ShapeError("values", f"shape [{groups}, {GROUP_BYTES}]", list(values.shape))
        if panel_start.shape != (panels + 1,):
            raise ShapeError("panel_start", f"shape [{panels + 1}]", list(panel_start.shape))
        check_vector("scale", scale, outputs)
        if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise ArgumentError("scale", "finite values > 0", "a NaN, an infinity or a value <= 0")
        steps = panel_start.diff()
        if int(panel_start[0]) != 0 or bool((steps < 0).any()) or int(panel_start[-1]) != groups:
            raise ArgumentError(
                "panel_start", f"0, never falling, up to {groups}", "something else"
            )
        limit = ceil_div(inputs, GROUP_INPUTS)
        if groups and (int(group_index.min()) < 0 or int(group_index.max()) >= limit):
            raise ArgumentError("group_index", f"values in [0, {limit})", "a value outside")
        owner = torch.arange(panels, device=steps.device).repeat_interleave(steps.long())
        if len(torch.unique(owner * limit + group_index.long())) != groups:
            raise ArgumentError(
                "group_index", "each group at most once a panel", "a repeated group"
            )
        packed = PackedWeight(
            values.contiguous(),
            group_index.contiguous(),
            panel_start.contiguous(),
            scale.contiguous(),
            torch.empty(0, dtype=torch.int32),
            outputs,
            inputs,
        )
        object.__setattr__(packed, "sum", packed.unpack().sum(1, dtype=torch.int32))
        return packed

    def unpack(self) -> torch.Tensor:
        """The int8 weight [N, K], dropped groups as zeros."""
        panels = len(self.panel_start) - 1
        groups = ceil_div(self.inputs, GROUP_INPUTS)
        device = self.values.device
        blocks = torch.zeros(
            panels, groups, PANEL_OUTPUTS, GROUP_INPUTS, dtype=torch.int8, device=device
        )
        owner = torch.arange(panels, device=device)
        owner = owner.repeat_interleave(self.panel_start.diff().long())
        blocks[owner, self.group_index.long()] = self.values.view(-1, PANEL_OUTPUTS, GROUP_INPUTS)
        weight = blocks.transpose(1, 2).reshape(panels * PANEL_OUTPUTS, groups * GROUP_INPUTS)
        return weight[: self.outputs, : self.inputs].contiguous()

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on that device."""
        values, index, starts, scale, total = (part.to(device) for part in self.parts())
        return PackedWeight(values, index, starts, scale, total, self.outputs, self.inputs)

    @property
    def density(self) -> float:
        """Share of the 32 x 4 groups that is kept, 0..1."""
        total = (len(self.panel_start) - 1) * ceil_div(self.inputs, GROUP_INPUTS)
        return len(self.group_index) / total


def check_inputs(inputs: int) -> None:
    """Raises ArgumentError unless int32 holds every sum over ``inputs`` inputs."""
    if not 0 < inputs <= MAX_INPUTS:
        raise ArgumentError(
            "weight", f"1 <= K <= {MAX_INPUTS}, for an exact int32 accumulator", f"K = {inputs}"
        )


def check_vector(name: str, tensor: torch.Tensor, length: int) -> None:
    """Raises DtypeError or ShapeError unless the tensor is float32 [length]."""
    if tensor.dtype != torch.float32:
        raise DtypeError(name, "float32", tensor.dtype)
    if tensor.shape != (length,):
        raise ShapeError(name, f"shape [{length}]", list(tensor.shape))

"""The packed weight as GPU kernels take it: panels in steps of 8 groups, and the folded epilogue.

The format is the packed one, in another order: of each panel, the groups of a chunk of 512 inputs
stand together and are filled up with groups of zeros to whole steps of 8 groups, the 32 inputs of
one matrix instruction; or of 16, the 64 of a sparse one, where the weight keeps 2 of every 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastrec.kernels._gpu import ceil_div
from fastrec.kernels.sparse_int8_linear import sparsity_2_4
from fastrec.kernels.sparse_int8_linear.packed import (
    GROUP_BYTES,
    GROUP_INPUTS,
    PANEL_OUTPUTS,
    PackedWeight,
)

STEP_GROUPS = 8
CHUNK_INPUTS = 512
CHUNK_GROUPS = CHUNK_INPUTS // GROUP_INPUTS
# Groups whose numbers differ in these low bits lie in different banks of shared memory.
BANKS = 4


@dataclass(frozen=True)
class DeviceWeight:
    """T steps of G = 8 groups, or 16 in the 2:4 form, over P panels and C chunks.

    Attributes:
        values: int8 [T, 8, 128]; 2:4: [T, 2, 32, 16], see ``sparsity_2_4.fragments``.
        meta: 2:4: int32 [T, 2, 32]; else None.
        index: int32 [T, G]; first input of the group / 4 (Triton).
        offset: int16 [T, G]; first input of the group within its chunk (CUDA C++).
        step_start: int32 [P, C + 1]; chunk c of panel p owns steps
            step_start[p, c]:step_start[p, c + 1].
        scale, sum: float32, int32 [P * 32]; the weight's own, 1 and 0 beyond N.
        paired: whether panels 2 i and 2 i + 1 keep the same groups, in the same steps; P is then
            even.
        steps: the most that a panel has.
    """

    values: torch.Tensor
    meta: torch.Tensor | None
    index: torch.Tensor
    offset: torch.Tensor
    step_start: torch.Tensor
    scale: torch.Tensor
    sum: torch.Tensor
    outputs: int
    inputs: int
    paired: bool
    steps: int

    @property
    def two_four(self) -> bool:
        """Whether the values are in the 2:4 form."""
        return self.meta is not None

    @property
    def panels(self) -> int:
        """P."""
        return self.step_start.shape[0]

    @property
    def chunks(self) -> int:
        """C."""
        return self.step_start.shape[1] - 1

    def to(self, device: torch.device) -> DeviceWeight:
        """The same weight on that device."""
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in self.__dict__.items()
        }
        return DeviceWeight(**moved)


def device_weight(packed: PackedWeight, *, two_four: bool = False) -> DeviceWeight:
    """The form of a packed weight on any device; the result is on the weight's. ``two_four`` is for
    weights that keep 2 of every 4 inputs."""
    step_groups = sparsity_2_4.STEP_GROUPS if two_four else STEP_GROUPS
    device = packed.values.device
    starts, index = packed.panel_start.cpu().long(), packed.group_index.cpu().long()
    panels = len(starts) - 1
    owner = torch.repeat_interleave(torch.arange(panels), starts.diff())
    chunks = ceil_div(packed.inputs, CHUNK_INPUTS)
    source, paired = torch.arange(len(index)), _paired(packed, index, owner, panels)
    if paired and panels % 2:
        # The last panel's partner: the same groups, of zeros.
        lonely = owner == panels - 1
        index = torch.cat([index, index[lonely]])
        owner = torch.cat([owner, owner[lonely] + 1])
        source = torch.cat([source, torch.full_like(source[lonely], -1)])
        panels += 1
    cell = owner * chunks + index // CHUNK_GROUPS
    order = _apart(cell, index)
    cell, index, source = cell[order], index[order], source[order]
    kept = torch.bincount(cell, minlength=panels * chunks)
    steps = (kept + step_groups - 1) // step_groups
    ends = steps.cumsum(0)
    total = int(ends[-1])
    # Where each group goes: its cell's first step, and its place in the cell.
    place = torch.arange(len(cell)) - (kept.cumsum(0) - kept)[cell]
    slot = (ends - steps)[cell] * step_groups + place
    # A group of zeros multiplies the chunk's first inputs, which are there.
    first_of_cell = (torch.arange(panels * chunks) % chunks * CHUNK_GROUPS).repeat_interleave(
        steps * step_groups
    )
    where = first_of_cell.clone()
    where[slot] = index
    values = torch.zeros(total * step_groups, GROUP_BYTES, dtype=torch.int8)
    real = source >= 0
    values[slot[real]] = packed.values.cpu()[source[real]]
    step_start = torch.zeros(panels, chunks + 1, dtype=torch.int64)
    step_start[:, 1:] = ends.view(panels, chunks)
    step_start[1:, 0] = step_start[:-1, -1]
    padded = panels * PANEL_OUTPUTS - packed.outputs

    def pad(part: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(part.cpu(), (0, padded), value=value)

    meta = None
    if two_four:
        values, meta = sparsity_2_4.fragments(values)
    else:
        values = values.view(total, STEP_GROUPS, GROUP_BYTES)
    offset = where % CHUNK_GROUPS * GROUP_INPUTS
    return DeviceWeight(
        values=values,
        meta=meta,
        index=where.view(total, step_groups).to(torch.int32),
        offset=offset.view(total, step_groups).to(torch.int16),
        step_start=step_start.to(torch.int32),
        scale=pad(packed.scale, 1.0),
        sum=pad(packed.sum, 0),
        outputs=packed.outputs,
        inputs=packed.inputs,
        paired=paired,
        steps=int((step_start[:, -1] - step_start[:, 0]).max()),
    ).to(device)


def _paired(packed: PackedWeight, index: torch.Tensor, owner: torch.Tensor, panels: int) -> bool:
    """Whether panels come in pairs that keep the same groups; a last one may be without."""
    kept = torch.zeros(panels, ceil_div(packed.inputs, GROUP_INPUTS), dtype=torch.bool)
    kept[owner, index] = True
    whole = panels // 2 * 2
    return panels > 1 and torch.equal(kept[0:whole:2], kept[1:whole:2])


def _apart(cell: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """An order by cell in which neighbours lie in different banks as far as the pattern allows: of
    every cell first the first group of each bank, then the second of each, and so on."""
    bank = index % BANKS
    key = cell * BANKS + bank
    order = torch.argsort(index, stable=True)
    order = order[torch.argsort(key[order], stable=True)]
    counts = torch.bincount(key)
    rank = torch.empty_like(key)
    rank[order] = torch.arange(len(key)) - (counts.cumsum(0) - counts)[key[order]]
    by_bank = torch.argsort(bank, stable=True)
    by_rank = by_bank[torch.argsort(rank[by_bank], stable=True)]
    return by_rank[torch.argsort(cell[by_rank], stable=True)]

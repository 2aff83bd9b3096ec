"""Weights that keep 2 of every 4 inputs of each output, as ``mma.sp`` takes them.

``NMPruning(2, 4)`` makes them; with kept groups of blocks that are 2:4 within, both gains add up.
"""

from __future__ import annotations

import torch

from fastrec.kernels.sparse_int8_linear.packed import GROUP_INPUTS, PANEL_OUTPUTS, PackedWeight

# Groups of one instruction's 64 inputs.
STEP_GROUPS = 16


def keeps_two_of_four(packed: PackedWeight) -> bool:
    """Whether every output has at most 2 weights that are not 0 in each of its groups."""
    groups = packed.values.view(-1, GROUP_INPUTS)
    return len(groups) > 0 and bool(((groups != 0).sum(1) <= 2).all())


def fragments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and metadata of each step that every lane of a warp holds.

    Args:
        values: int8 [16 T, 128], whole steps of groups of 32 outputs x 4 inputs.

    Returns:
        int8 [T, 2, 32, 16], of each 16 outputs and lane the four registers of what is kept, and
        int32 [T, 2, 32], where in their fours they stood.
    """
    # [T, 16 groups, 32 outputs, 4]
    groups = values.view(-1, STEP_GROUPS, PANEL_OUTPUTS, GROUP_INPUTS)
    # The first two that are not 0; zeros fill what is missing. Places rise.
    order = (groups == 0).to(torch.int64) * GROUP_INPUTS + torch.arange(GROUP_INPUTS)
    places = order.argsort(-1)[..., :2].sort(-1).values
    kept = groups.gather(-1, places)
    # Lane 4 g + t holds of groups 8 k + 2 t + p, outputs 16 h + 8 r + g, in register 2 k + r.
    # [T, k, t, p, h, r, g, 2] -> [T, h, g, t, k, r, p, 2]
    apart = kept.view(-1, 2, 4, 2, 2, 2, 8, 2).permute(0, 4, 6, 2, 1, 5, 3, 7)
    # 4 bits a group; lane 4 g + 2 k + r holds those of groups 8 k .. 8 k + 7 of row 8 r + g.
    bits = places[..., 0] | places[..., 1] << 2
    # [T, k, 8, h, r, g] -> [T, k, h, r, g] -> [T, h, g, k, r]
    shifts = (4 * torch.arange(8)).view(8, 1, 1, 1)
    words = (bits.view(-1, 2, 8, 2, 2, 8) << shifts).sum(2).permute(0, 2, 4, 1, 3)
    # The upper half of 32 bits is negative.
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return apart.reshape(-1, 2, 32, 16).contiguous(), signed.reshape(-1, 2, 32).contiguous()

"""Lossless tensor codecs of the artifact: pruned tensors as bitmask and kept values.

| codec | stored | for |
|---|---|---|
| raw | the tensor | everything else |
| masked | ``name``: kept groups [n, 4]; ``name#mask``: uint8, one bit a group, first group in the
lowest bit | tensors with many all-zero groups of 4 consecutive elements of the last dimension | |
narrow | ``name``: uint16 | int32 and int64 whose values fit | | alias | nothing | a tensor that
shares the memory of another (tied weights) |

"Zero" means all bits zero, so -0.0 survives and every codec is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrec.errors import ArtifactError

GROUP = 4
_MIN_ELEMENTS = 1024  # below, the entry in the manifest outweighs what is won
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}

Entry = dict[str, Any]


def encode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """(what goes into the tensor file, the manifest's entry of each tensor)."""
    stored: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        value = tensor.detach().cpu().contiguous()
        entry: Entry = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
        }
        first = seen.setdefault(memory, name) if value.numel() else name
        if first != name:
            entry |= {"codec": "alias", "of": first}
        elif (masked := _mask(value)) is not None:
            entry["codec"] = "masked"
            stored[name], stored[f"{name}#mask"] = masked
        elif _fits_uint16(value):
            entry["codec"] = "narrow"
            stored[name] = value.to(torch.uint16)
        else:
            entry["codec"] = "raw"
            # A view would drag the whole tensor behind it into the file.
            stored[name] = value.clone() if value.untyped_storage().size() > value.nbytes else value
        entries[name] = entry
    return stored, entries


def decode(stored: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors that :func:`encode` was given.

    Raises:
        ArtifactError: tensors missing or extra, or that do not fit their entry.
    """
    unread = set(stored)
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        codec = entry.get("codec")
        shape = [int(size) for size in entry.get("shape", [])]
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None or any(size < 0 for size in shape):
            raise ArtifactError(f"tensor {name!r}: bad entry {entry}")
        if codec == "alias":
            if entry.get("of") not in tensors:
                raise ArtifactError(f"tensor {name!r}: alias of {entry.get('of')!r}, not there")
            value = tensors[entry["of"]]
        elif codec == "masked":
            mask = _take(stored, unread, f"{name}#mask")
            value = _unmask(name, _take(stored, unread, name), mask, shape)
        elif codec == "narrow":
            value = _take(stored, unread, name).to(dtype)
        elif codec == "raw":
            value = _take(stored, unread, name)
        else:
            raise ArtifactError(f"tensor {name!r}: unknown codec {codec!r}")
        if value.dtype != dtype or list(value.shape) != shape:
            raise ArtifactError(
                f"tensor {name!r}: expected {dtype} {shape}, got {value.dtype} {list(value.shape)}"
            )
        tensors[name] = value
    if unread:
        raise ArtifactError(f"tensors that the manifest does not list: {sorted(unread)}")
    return tensors


def _take(stored: Mapping[str, Tensor], unread: set[str], name: str) -> Tensor:
    if name not in unread:
        raise ArtifactError(f"tensor {name!r} is missing")
    unread.discard(name)
    return stored[name]


def _mask(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """(kept groups [n, 4], bitmask uint8 [ceil(groups / 8)]) where that is smaller, else None."""
    if value.ndim == 0 or value.shape[-1] % GROUP or value.numel() < _MIN_ELEMENTS:
        return None
    groups = value.view(-1, GROUP)
    kept = (groups.view(torch.uint8) != 0).any(1)
    n_kept, n_groups = int(kept.sum()), len(kept)
    if (n_groups - n_kept) * GROUP * value.element_size() <= -(-n_groups // 8):
        return None
    bits = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    return groups[kept].contiguous(), bits


def _unmask(name: str, values: Tensor, mask: Tensor, shape: list[int]) -> Tensor:
    total = int(np.prod(shape, dtype=np.int64))
    n_groups = total // GROUP
    if mask.dtype != torch.uint8 or mask.shape != (-(-n_groups // 8),) or total % GROUP:
        raise ArtifactError(f"tensor {name!r}: its mask does not fit shape {shape}")
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    kept = torch.from_numpy(bits[:n_groups].astype(bool))
    if bits[n_groups:].any() or list(values.shape) != [int(kept.sum()), GROUP]:
        raise ArtifactError(f"tensor {name!r}: its mask does not fit the {len(values)} groups kept")
    groups = torch.zeros(n_groups, GROUP, dtype=values.dtype)
    groups[kept] = values
    return groups.view(shape)


def _fits_uint16(value: Tensor) -> bool:
    if value.dtype not in (torch.int32, torch.int64) or value.numel() < _MIN_ELEMENTS:
        return False
    return bool((value.amin() >= 0) & (value.amax() < 1 << 16))

"""Lossless tensor codecs of the artifact: bitmasks for zeros, Huffman codes for bytes.

| codec | stored | for |
|---|---|---|
| raw | the tensor | everything else |
| masked | ``name``: kept groups [n, g]; ``name#mask``: uint8, one bit a group, first group in the
lowest bit | tensors with many all-zero groups of g = 4 or 1 consecutive elements of the last
dimension |
| narrow | ``name``: uint16 | int32 and int64 whose values fit |
| alias | nothing | a tensor that shares the memory of another (tied weights) |

Stored tensors of bytes (int8 codes, masks) become a Huffman-coded deflate stream (RFC 1951, without
matches, which noise does not have) where that saves at least 1/32; ``huffman`` in the entry names
those parts. Codes of rows that are scaled to their largest value have about 7.6 of 8
bits of entropy, those with fewer levels less (:class:`~fastrec.Int8`).

"Zero" means all bits zero, so -0.0 survives and every codec is exact to the bit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrec.errors import ArtifactError

GROUPS = (4, 1)  # the first is what an entry without "group" has
_MIN_ELEMENTS = 1024  # below, the entry in the manifest is larger than the saving
_DEFLATE_AT_MOST = 1032  # the largest expansion factor of a deflate stream
DTYPES = {
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


def cannot_store(value: Tensor) -> str | None:
    """Why :func:`decode` could not give ``value`` back, or None."""
    if value.layout != torch.strided:
        return f"layout {value.layout}"
    if value.is_meta:
        return "no values (device meta)"
    return None if value.dtype in DTYPES.values() else f"dtype {value.dtype}"


def encode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Encode tensors.

    Returns:
        the content of the tensor file, and the manifest's entry of each tensor.
    """
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
            entry |= {"codec": "masked", "group": masked[0].shape[1]}
            stored[name], stored[f"{name}#mask"] = masked
        elif _fits_uint16(value):
            entry["codec"] = "narrow"
            stored[name] = value.to(torch.uint16)
        else:
            entry["codec"] = "raw"
            # A view would drag the whole tensor behind it into the file.
            stored[name] = value.clone() if value.untyped_storage().size() > value.nbytes else value
        coded = [part for part in ("", "#mask") if _squeeze(stored, name + part)]
        entries[name] = entry | ({"huffman": coded} if coded else {})
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
        dtype = DTYPES.get(str(entry.get("dtype")))
        if dtype is None or any(size < 0 for size in shape):
            raise ArtifactError(f"tensor {name!r}: bad entry {entry}")
        parts = _Parts(stored, unread, name, entry.get("huffman", ()))
        if codec == "alias":
            if entry.get("of") not in tensors:
                raise ArtifactError(f"tensor {name!r}: alias of {entry.get('of')!r}, not there")
            value = tensors[entry["of"]]
        elif codec == "masked":
            value = _unmask(parts, dtype, shape, entry.get("group", GROUPS[0]))
        elif codec == "narrow":
            value = parts.take("", torch.uint16, shape).to(dtype)
        elif codec == "raw":
            value = parts.take("", dtype, shape)
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


class _Parts:
    """The stored parts of one tensor in the tensor file."""

    def __init__(
        self, stored: Mapping[str, Tensor], unread: set[str], name: str, coded: Any
    ) -> None:
        self.stored, self.unread, self.name, self.coded = stored, unread, name, coded
        if not isinstance(coded, list | tuple) or not set(map(str, coded)) <= {"", "#mask"}:
            raise ArtifactError(f"tensor {name!r}: bad list of Huffman-coded parts {coded!r}")

    def take(self, part: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        """The part, checked for dtype and shape."""
        full = self.name + part
        if full not in self.unread:
            raise ArtifactError(f"tensor {full!r} is missing")
        self.unread.discard(full)
        value = self.stored[full]
        if part in self.coded:
            if value.dtype != torch.uint8 or value.ndim != 1 or dtype.itemsize != 1:
                raise ArtifactError(f"tensor {full!r}: not a coded tensor of bytes")
            size = math.prod(shape)
            value = _inflate(full, value.numpy().tobytes(), size).view(dtype).view(shape)
        if value.dtype != dtype or list(value.shape) != shape:
            found = f"{value.dtype} {list(value.shape)}"
            raise ArtifactError(f"tensor {full!r}: expected {dtype} {shape}, got {found}")
        return value


def _squeeze(stored: dict[str, Tensor], name: str) -> bool:
    """Huffman-code the stored tensor where it is one of bytes and gets smaller by 1/32."""
    value = stored.get(name)
    if value is None or value.dtype not in (torch.int8, torch.uint8):
        return False
    if value.numel() < _MIN_ELEMENTS:
        return False
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(value.numpy().tobytes()) + coder.flush()
    if len(data) > value.numel() * 31 // 32:
        return False
    stored[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return True


def _inflate(name: str, data: bytes, size: int) -> Tensor:
    """Decode exactly ``size`` bytes; a forged stream allocates at most one byte more."""
    if size > _DEFLATE_AT_MOST * len(data):
        raise ArtifactError(f"tensor {name!r}: {len(data)} bytes cannot hold {size}")
    decoder = zlib.decompressobj(-15)
    try:
        plain = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise ArtifactError(f"tensor {name!r}: not a deflate stream ({error})") from error
    if len(plain) != size or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"tensor {name!r}: its stream does not hold just {size} bytes")
    return torch.frombuffer(bytearray(plain), dtype=torch.uint8)


def _mask(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """(kept groups [n, g], bitmask uint8 [ceil(groups / 8)]) where that is smaller, else None."""
    if value.ndim == 0 or value.numel() < _MIN_ELEMENTS:
        return None
    zero = value.view(-1, 1).view(torch.uint8).any(1).logical_not()
    best, found = value.nbytes, None
    for group in GROUPS:
        if value.shape[-1] % group:
            continue
        kept = ~zero.view(-1, group).all(1)
        size = int(kept.sum()) * group * value.element_size() + -(-len(kept) // 8)
        if size < best:
            best, found = size, (group, kept)
    if found is None:
        return None
    group, kept = found
    bits = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    return value.view(-1, group)[kept].contiguous(), bits


def _unmask(parts: _Parts, dtype: torch.dtype, shape: list[int], group: Any) -> Tensor:
    total = math.prod(shape)
    if group not in GROUPS or total % group:
        raise ArtifactError(f"tensor {parts.name!r}: groups of {group!r} do not fit shape {shape}")
    n_groups = total // group
    mask = parts.take("#mask", torch.uint8, [-(-n_groups // 8)])
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    kept = torch.from_numpy(bits[:n_groups].astype(bool))
    if bits[n_groups:].any():
        raise ArtifactError(f"tensor {parts.name!r}: its mask does not fit shape {shape}")
    values = parts.take("", dtype, [int(kept.sum()), group])
    groups = torch.zeros(n_groups, group, dtype=dtype)
    groups[kept] = values
    return groups.view(shape)


def _fits_uint16(value: Tensor) -> bool:
    if value.dtype not in (torch.int32, torch.int64) or value.numel() < _MIN_ELEMENTS:
        return False
    return bool((value.amin() >= 0) & (value.amax() < 1 << 16))

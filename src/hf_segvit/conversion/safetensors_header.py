"""Checks of a safetensors file before a byte of its tensors is trusted.

The format: 8 bytes with the length n of the header (little-endian), n bytes of JSON that give dtype, shape and byte
range of every tensor, then the tensors. The ranges must tile the rest of the file exactly, without gap or overlap.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

# The limit of the reference implementation. The header of a giant with 1000 tensors has about 100 kB.
MAX_HEADER_BYTES = 100_000_000

# Bytes of one element.
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_REMEDY = "the file is damaged or was not made by safetensors; fetch it again"


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Check the header of a safetensors file against the file.

    Args:
        path: the file.

    Returns:
        Per tensor name its entry: `dtype`, `shape` and `data_offsets`.

    Raises:
        ValueError: the header is too long, no JSON or lists tensors that are not there; the message names the file,
            the tensor and what is wrong with it.
    """
    file_size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: only {file_size} bytes, too short for a safetensors file; {_REMEDY}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed; {_REMEDY}"
            )
        if 8 + length > file_size:
            raise ValueError(f"{path}: its header claims {length} bytes, but the file has {file_size}; {_REMEDY}")
        text = file.read(length)
    entries = _parse(path, text)
    _check_ranges(path, entries, data_size=file_size - 8 - length)
    return entries


def _parse(path: Path, text: bytes) -> dict[str, dict[str, Any]]:
    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is listed twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header cannot be read ({error}); {_REMEDY}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is not a table of tensors; {_REMEDY}")
    header.pop("__metadata__", None)
    return header


def _check_ranges(path: Path, entries: dict[str, Any], data_size: int) -> None:
    ranges = []
    for name, entry in entries.items():
        begin, end = _check_entry(path, name, entry)
        if end > data_size:
            raise ValueError(
                f"{path}: tensor {name!r} ends at byte {end} of {data_size}; the file is cut short, fetch it again"
            )
        ranges.append((begin, end, name))
    position, previous = 0, "the header"
    for begin, end, name in sorted(ranges):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a gap after"
            raise ValueError(f"{path}: tensor {name!r} at byte {begin} {what} {previous}; {_REMEDY}")
        position, previous = end, f"tensor {name!r}"
    if position != data_size:
        raise ValueError(f"{path}: {data_size - position} bytes after the last tensor belong to none; {_REMEDY}")


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: the entry of tensor {name!r} lacks dtype, shape or data_offsets; {_REMEDY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{path}: tensor {name!r} has the dtype {dtype!r}, which is not supported")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{path}: tensor {name!r} has shape {shape} and data_offsets {offsets}; {_REMEDY}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} does not fill its bytes {offsets}; {_REMEDY}"
        )
    return offsets[0], offsets[1]

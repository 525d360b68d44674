"""Check the header of a safetensors file before any of its tensors is read.

The format: 8 bytes with the length n of the header, n bytes of JSON that give dtype, shape and byte range of every
tensor, then the tensors. `check_safetensors` checks one file, `check_shards` the files that an index names.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checkpoint_json import MAX_JSON_BYTES, parse_table, read_table, shown

Entries = dict[str, dict[str, Any]]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_DTYPE_BYTES = {  # of one element
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# Buffers that models of Transformers store as whole numbers.
_WHOLE_NUMBERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked|relative_position_index)$")
# Bytes of a header beyond those that its entries need, such as for metadata; writers pad to 8 bytes.
_SPARE_BYTES = 2**16
_MAX_DIMENSIONS = 8
_MAX_EMPTY = 2**24  # product of the other dimensions of a tensor without elements
_REMEDY = "the file is damaged or was not made by safetensors; fetch it again"


def check_safetensors(path: str | os.PathLike[str]) -> Entries:
    """Check a safetensors file's header and return `dtype`, `shape` and `data_offsets` by tensor name.

    Raises:
        ValueError: it is no regular file, or its header is too long, not JSON, or does not describe its bytes.
    """
    if not os.path.isfile(path):  # such as a pipe, from which reading never ends
        raise ValueError(f"{path}: no such file, or not a regular one; fetch it again")
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: only {file_size} bytes, too short for a safetensors file; {_REMEDY}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_JSON_BYTES:
            raise ValueError(
                f"{path}: its header claims {length} bytes, more than the {MAX_JSON_BYTES} allowed; {_REMEDY}"
            )
        if 8 + length > file_size:
            raise ValueError(f"{path}: its header claims {length} bytes, but the file has {file_size}; {_REMEDY}")
        text = file.read(length)
    if text and text.lstrip()[:1] == b"{" and not text.startswith(b"{"):
        raise ValueError(f"{path}: its header is not a table of tensors; {_REMEDY}")
    try:
        entries: Entries = parse_table(text, f"{path}: its header")
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: its __metadata__ is {shown(metadata)}, not a table of texts; {_REMEDY}")
    blank = len(text) - len(b"".join(text.split()))
    if blank > _SPARE_BYTES + 16 * len(entries):
        raise ValueError(f"{path}: {blank} bytes of its header are white space; {_REMEDY}")
    _check_ranges(path, entries, data_size=file_size - 8 - length)
    return entries


def _check_ranges(path: Any, entries: Entries, data_size: int) -> None:
    ranges = []
    for name, entry in entries.items():
        begin, end = _check_entry(path, name, entry)
        if end > data_size:
            raise ValueError(
                f"{path}: tensor {shown(name)} ends at byte {end} of {data_size}; the file is cut short, fetch it again"
            )
        ranges.append((begin, end, name))
    # The ranges must tile the rest of the file: an overlap or a gap can hide data that another reader would see.
    position, previous = 0, "the header"
    for begin, end, name in sorted(ranges):
        if begin != position:
            relation = "overlaps" if begin < position else "leaves a gap after"
            raise ValueError(f"{path}: tensor {shown(name)} at byte {begin} {relation} {previous}; {_REMEDY}")
        position, previous = end, f"tensor {shown(name)}"
    if position != data_size:
        raise ValueError(f"{path}: {data_size - position} bytes after the last tensor belong to none; {_REMEDY}")


def _check_entry(path: Any, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: the entry of tensor {shown(name)} lacks dtype, shape or data_offsets; {_REMEDY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{path}: tensor {shown(name)} has the dtype {shown(dtype)}, which is not supported")
    for numbers in (shape, offsets):  # `type`, as True would pass for the number 1
        if (
            not isinstance(numbers, list)
            or len(numbers) > _MAX_DIMENSIONS
            or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ):
            raise ValueError(
                f"{path}: tensor {shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}; {_REMEDY}"
            )
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ValueError(
            f"{path}: tensor {shown(name)} of shape {shown(shape)} and dtype {dtype} does not fill its bytes "
            f"{shown(offsets)}; {_REMEDY}"
        )
    if math.prod(side or 1 for side in shape) > _MAX_EMPTY and not math.prod(shape):
        raise ValueError(f"{path}: tensor {shown(name)} has no elements, but the shape {shown(shape)}; {_REMEDY}")
    return offsets[0], offsets[1]


def check_float(path: Any, entries: Entries) -> None:
    """Refuse weights that are not floating point, which would be converted without a word."""
    for name, entry in entries.items():
        if entry["dtype"] not in FLOAT_DTYPES and not _WHOLE_NUMBERS.search(name):
            raise ValueError(
                f"{path}: tensor {shown(name)} has the dtype {entry['dtype']}; weights are one of "
                f"{', '.join(FLOAT_DTYPES)}, and quantised ones are not supported, so take the original ones"
            )


def weight_map(path: str | os.PathLike[str], suffixes: Iterable[str] = (".safetensors",)) -> dict[str, str]:
    """The map from parameter to shard in an index file, every shard a plain file name with one of the endings."""
    content = read_table(path)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: its weight_map is {shown(found)}, which is no table of parameters and files")
    # A downloaded index must not make us open files elsewhere, such as ../../secret.pth.
    for name, shard in found.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00]{1,255}", shard) or shard in (".", ".."):
            raise ValueError(
                f"{path}: weight_map places {shown(name)} in {shown(shard)}, which is not a file beside it; not opened"
            )
        if Path(shard).suffix not in suffixes:
            raise ValueError(
                f"{path}: weight_map places {shown(name)} in {shown(shard)}, which is no checkpoint file; not opened"
            )
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: its metadata is {shown(metadata)}, not a table")
    return found


def check_shards(index: str | os.PathLike[str]) -> Entries:
    """Check an index and the headers of its shards, which lie beside it; the entries of all.

    Raises:
        ValueError: a shard is missing, damaged or elsewhere, or index and shards disagree about a tensor.
    """
    places = weight_map(index)
    if "metadata" not in read_table(index):
        raise ValueError(f'{index}: lacks metadata, which Transformers reads; add "metadata": {{}} to it')
    entries: Entries = {}
    for shard in sorted(set(places.values())):
        path = Path(index).parent / shard
        if not path.is_file():
            raise ValueError(f"{index}: names the shard {shown(shard)}, which is not a file beside it; fetch it too")
        found = check_safetensors(path)
        # In two shards, one would win, and which is chance.
        odd = sorted(found.keys() ^ {name for name, place in places.items() if place == shard})
        if odd:
            relation = "also holds" if odd[0] in found else "lacks"
            raise ValueError(f"{index} and its shard disagree: {shard} {relation} {shown(odd[0])}; fetch both again")
        entries.update(found)
    return entries

"""Checks of weights, the same for loading, converting and publishing: are they finite, and those of the model?

`check_finite` and `check_complete` look at tensors by name, `check_weights` also at their dtypes, and `format_hint`
says whose the names are where they are not ours. `check_safetensors` reads the header of a file before a byte of its
tensors is trusted. The format: 8 bytes with the length n of the header (little-endian), n bytes of JSON that give
dtype, shape and byte range of every tensor, then the tensors. The ranges must tile the rest of the file exactly,
without gap or overlap.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A name that only one format has, what that format is, and what to do with it.
_KNOWN_FORMATS = (
    (r"eomt\.layers\.\d+\.", "this package's own EoMT", "it needs no conversion, load it with from_pretrained"),
    (r"(network\.)?encoder\.backbone\.", "the official EoMT code", "use `hf-segvit convert official-eomt`"),
    (r"upscale_block\.block\.", "Transformers' eomt", "use `hf-segvit convert transformers-eomt`"),
    (r"sem_seg_head\.|model\.pixel_level_module\.", "Mask2Former", "another architecture, which cannot be converted"),
    (r"blocks\.\d+\.attn\.", "a backbone of timm", "use `hf-segvit convert timm`, or from_backbone to train on it"),
    (r"(model\.)?layer\.\d+\.|encoder\.layer\.\d+\.", "a backbone of Transformers", "use from_backbone to train on it"),
    (r"layer[1-4]\.\d+\.conv\d", "a ResNet", "another architecture, which cannot be converted"),
)


def check_weights(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that cannot be weights.

    Args:
        state_dict: names to tensors.
        source: where they come from, named in errors.

    Raises:
        ValueError: a tensor is not floating point, or holds NaN or infinity; the message names it.
    """
    for name, tensor in state_dict.items():
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{source}: {name} has the dtype {tensor.dtype}; quantised weights cannot be converted, use the "
                "original ones"
            )
    check_finite(state_dict, source)


def check_finite(state_dict: Mapping[str, Tensor], source: object) -> None:
    """Refuse NaN and infinity in weights, with which every answer of a model would be empty or senseless.

    Args:
        state_dict: names to tensors, of which those of whole numbers pass.
        source: where they come from, named in errors.

    Raises:
        ValueError: naming the first such tensor.
    """
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = int(finite.numel() - finite.sum())
            raise ValueError(
                f"{source}: {name} holds NaN or infinity ({bad} of {finite.numel()} values); its training diverged or "
                "the file is damaged, so take an earlier checkpoint or copy it again"
            )


def check_complete(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    remedy: str,
    what: str = "the weights do not fit the model",
) -> None:
    """Refuse weights that are not exactly those of a model.

    Args:
        state_dict: names to tensors, which may be on the meta device.
        expected: the model's names and tensors of the right shapes, which may be on the meta device.
        remedy: what to do about it; ends the message.
        what: begins the message.

    Raises:
        ValueError: a parameter is missing, has no place in the model, or is of another shape; the message names it.
    """
    refuse_misfits(
        [name for name in expected if name not in state_dict],
        [name for name in state_dict if name not in expected],
        [
            (name, state_dict[name].shape, tensor.shape)
            for name, tensor in expected.items()
            if name in state_dict and state_dict[name].shape != tensor.shape
        ],
        remedy,
        what,
    )


def refuse_misfits(
    missing: Sequence[str],
    extra: Sequence[str],
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    remedy: str,
    what: str,
) -> None:
    """Raise the error of `check_complete` where others have compared, as `from_pretrained` does.

    Args:
        missing: parameters of the model that the weights lack.
        extra: names that have no place in the model.
        mismatched: names, their shapes, and the shapes that the model has.
        remedy: as for `check_complete`.
        what: as for `check_complete`.

    Raises:
        ValueError: there are any.
    """
    problems = [f"{len(missing)} parameters are missing, such as {missing[0]!r}"] if missing else []
    problems += [f"{len(extra)} have no place in the model, such as {extra[0]!r}"] if extra else []
    problems += [
        f"{name!r} has shape {tuple(shape)} instead of {tuple(expected)}" for name, shape, expected in mismatched
    ]
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems[:3])}; {remedy}")


def format_hint(names: Iterable[str], but: str) -> str:
    """A half sentence on the format that parameter names belong to and what to do, or nothing.

    Args:
        names: parameter names of the checkpoint.
        but: the format that it was taken for, which is no news.
    """
    names = list(names)
    for pattern, format_name, advice in _KNOWN_FORMATS:
        if format_name != but and any(re.match(pattern, name) for name in names):
            return f"; it looks like {format_name}: {advice}"
    return ""


def mapping_lines(names: Iterable[str]) -> list[str]:
    """How many tensors each kind of module got, all blocks taken together, as lines of text."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", name)) for name in names)
    return [f"{count:5d} tensors  {name}" for name, count in counts.items()]


def common_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    """The one dtype of all weights, or fp32 where they differ or are in double precision."""
    dtypes = {tensor.dtype for tensor in state_dict.values()}
    return dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32


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

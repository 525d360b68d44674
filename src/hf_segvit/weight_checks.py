"""Check weights: finite, complete, and in a sound safetensors file.

Loading, converting and publishing share these checks. `check_weights`, `check_finite` and `check_complete` inspect
tensors by name, `format_hint` recognises the names of other formats, and `check_safetensors` checks a file's header
before any of its tensors is read.
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

# A pattern of names that only one format has, the format, and what to do about it.
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
    """Raise `ValueError` if a tensor from `source` is not floating point or holds NaN or infinity."""
    for name, tensor in state_dict.items():
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{source}: {name} has the dtype {tensor.dtype}; quantised weights cannot be converted, use the "
                "original ones"
            )
    check_finite(state_dict, source)


def check_finite(state_dict: Mapping[str, Tensor], source: object) -> None:
    """Raise `ValueError` if a tensor from `source` holds NaN or infinity."""
    # Transformers loads such weights without a word, and every answer of the model is then empty or senseless.
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
    """Refuse weights whose names or shapes differ from a model's.

    Args:
        state_dict: the weights, of which only names and shapes are used; meta tensors will do.
        expected: the model's own, likewise.
        remedy: end of the error message.
        what: start of the error message.

    Raises:
        ValueError: a parameter is missing, unknown to the model, or of another shape.
    """
    missing = [name for name in expected if name not in state_dict]
    extra = [name for name in state_dict if name not in expected]
    shapes = [(name, state_dict[name].shape, tensor.shape) for name, tensor in expected.items() if name in state_dict]
    mismatched = [(name, shape, wanted) for name, shape, wanted in shapes if shape != wanted]
    refuse_misfits(missing, extra, mismatched, remedy, what)


def refuse_misfits(
    missing: Sequence[str],
    extra: Sequence[str],
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    remedy: str,
    what: str,
) -> None:
    """Raise the error of `check_complete` for names that were found elsewhere, such as by `from_pretrained`.

    Args:
        missing: parameters that the weights lack.
        extra: names that the model does not have.
        mismatched: names, their shapes, and the model's shapes.
        remedy: end of the error message, as `what` is its start.
    """
    problems = [f"{len(missing)} parameters are missing, such as {missing[0]!r}"] if missing else []
    problems += [f"{len(extra)} unknown to the model, such as {extra[0]!r}"] if extra else []
    problems += [
        f"{name!r} has shape {tuple(shape)} instead of {tuple(expected)}" for name, shape, expected in mismatched
    ]
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems[:3])}; {remedy}")


def format_hint(names: Iterable[str], but: str) -> str:
    """The end of an error about parameter names: their format, unless it is `but`, and what to do; or nothing."""
    names = list(names)
    for pattern, format_name, advice in _KNOWN_FORMATS:
        if format_name != but and any(re.match(pattern, name) for name in names):
            return f"; it looks like {format_name}: {advice}"
    return ""


def mapping_lines(names: Iterable[str]) -> list[str]:
    """Numbers of tensors by module, all blocks counted together, as lines of text."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", name)) for name in names)
    return [f"{count:5d} tensors  {name}" for name, count in counts.items()]


def common_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that all weights have in common; float32 if they differ or are float64."""
    dtypes = {tensor.dtype for tensor in state_dict.values()}
    return dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32


# The limit of the reference implementation. The header of a giant ViT with 1000 tensors has about 100 kB.
MAX_HEADER_BYTES = 100_000_000
_DTYPE_BYTES = {  # of one element
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_REMEDY = "the file is damaged or was not made by safetensors; fetch it again"


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Check a safetensors file's header and return `dtype`, `shape` and `data_offsets` by tensor name.

    Raises:
        ValueError: the header is too long, not JSON, or does not describe the bytes of the file.
    """
    # The format: 8 bytes with the length n of the header, n bytes of JSON that give dtype, shape and byte range of
    # every tensor, then the tensors.
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
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # `json` would silently keep the last.
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{duplicate!r} is listed twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # deeply nested JSON exhausts the stack
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
    # The ranges must tile the rest of the file: an overlap or a gap can hide data that another reader would see.
    position, previous = 0, "the header"
    for begin, end, name in sorted(ranges):
        if begin != position:
            relation = "overlaps" if begin < position else "leaves a gap after"
            raise ValueError(f"{path}: tensor {name!r} at byte {begin} {relation} {previous}; {_REMEDY}")
        position, previous = end, f"tensor {name!r}"
    if position != data_size:
        raise ValueError(f"{path}: {data_size - position} bytes after the last tensor belong to none; {_REMEDY}")


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: the entry of tensor {name!r} lacks dtype, shape or data_offsets; {_REMEDY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{path}: tensor {name!r} has the dtype {dtype!r}, which is not supported")
    for numbers in (shape, offsets):  # `type`, as True would pass for the number 1
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{path}: tensor {name!r} has shape {shape} and data_offsets {offsets}; {_REMEDY}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} does not fill its bytes {offsets}; {_REMEDY}"
        )
    return offsets[0], offsets[1]

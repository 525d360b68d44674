"""Check weights: of floating point, finite, and complete.

Loading, converting and publishing share these checks. `check_weights`, `check_finite` and `check_complete` inspect
tensors by name, and `format_hint` recognises the names of other formats. Headers of files are checked, before any
tensor is read, by `models/safetensors_header.py`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A pattern of names that only one format has, the format, and what to do about it.
_KNOWN_FORMATS = (
    (r"eomt\.layers\.\d+\.", "this package's own EoMT", "it needs no conversion, load it with from_pretrained"),
    (r"(network\.)?encoder\.backbone\.", "the official EoMT code", "use `hf-segvit convert official-eomt`"),
    (r"upscale_block\.block\.", "Transformers' eomt", "use `hf-segvit convert transformers-eomt`"),
    (r"sem_seg_head\.", "Mask2Former", "another architecture, which cannot be converted"),
    (r"model\.pixel_level_module\.", "Transformers' Mask2Former", "use `hf-segvit convert mask2former-head`"),
    (r"(backbone\.)?(spm|interactions)\.", "a ViT-Adapter", "use `hf-segvit convert vit-adapter`"),
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

"""What every conversion checks of weights, whatever their format: that they are finite numbers and complete."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

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


def check_weights(state_dict: Mapping[str, Tensor], place: str) -> None:
    """Refuse tensors that cannot be weights.

    Args:
        state_dict: names to tensors.
        place: where they come from, named in errors.

    Raises:
        ValueError: a tensor is not floating point, or holds NaN or infinity; the message names it.
    """
    for name, tensor in state_dict.items():
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{place}: {name} has the dtype {tensor.dtype}; quantised weights cannot be converted, use the "
                "original ones"
            )
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = int(finite.numel() - finite.sum())
            raise ValueError(f"{place}: {name} holds NaN or infinity ({bad} of {finite.numel()} values); it is broken")


def check_complete(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse weights that are not exactly those of a model.

    Args:
        state_dict: names to tensors.
        expected: the model's names and tensors of the right shapes, which may be on the meta device.
        remedy: what to do about it; ends the message.

    Raises:
        ValueError: a parameter is missing, has no place in the model, or is of another shape; the message names it.
    """
    missing = [name for name in expected if name not in state_dict]
    extra = [name for name in state_dict if name not in expected]
    problems = [f"{len(missing)} parameters are missing, such as {missing[0]!r}"] if missing else []
    problems += [f"{len(extra)} have no place in the model, such as {extra[0]!r}"] if extra else []
    problems += [
        f"{name!r} has shape {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:3])}; {remedy}")


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

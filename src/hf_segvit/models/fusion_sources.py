"""Load the parts of a fused model from ids, folders or objects.

In order: the generator, the classifier, and the prompts of a OneFormer. A checkpoint of Transformers' own EoMT becomes
EoMT of this package, which computes the same, faster; a model given as an object stays what it is.
"""

import os
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from .checkpoint_guard import load_foreign_model
from .checkpoint_json import hub_arguments, stored_config
from .configuration_eomt import EoMTConfig
from .configuration_mask2former_vit import Mask2FormerViTConfig
from .configuration_vit_p import ViTPConfig
from .image_processing_eomt import TASKS
from .mask2former_annealing import restore_mask_annealing
from .modeling_eomt import EoMTForUniversalSegmentation
from .modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from .modeling_vit_p import ViTPForPointClassification
from .transformers_eomt import TRANSFORMERS_EOMT_TYPES

Source = str | os.PathLike[str] | nn.Module


def generator_of(source: Source, **kwargs: Any) -> Any:
    """A model with the outputs of Mask2Former as it is, or loaded from a folder or the Hub.

    `kwargs`, such as `revision`, go to `from_pretrained`; a ValueError refuses a checkpoint of another kind.
    """
    if isinstance(source, nn.Module):
        return source
    model_type = _model_type(source, kwargs)
    if model_type in (EoMTConfig.model_type, *TRANSFORMERS_EOMT_TYPES):
        return EoMTForUniversalSegmentation.from_pretrained(source, **kwargs)
    if model_type == Mask2FormerViTConfig.model_type:
        return Mask2FormerViTForUniversalSegmentation.from_pretrained(source, **kwargs)
    try:
        return restore_mask_annealing(load_foreign_model(source, **kwargs))
    except ValueError as error:
        # A broken configuration is a ValueError too, and its message is the better one.
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"the generator is of type {model_type!r}; it must be a universal segmentation model of Transformers, such "
            "as Mask2Former, or an EoMT (is the order generator, classifier?)"
        ) from error


def classifier_of(source: Source, **kwargs: Any) -> ViTPForPointClassification:
    """A ViT-P as it is, or loaded from a folder or the Hub with `from_pretrained(source, **kwargs)`."""
    name = ViTPForPointClassification.__name__
    if isinstance(source, nn.Module):
        # By name: remote code from a checkpoint has one copy of a class for each file that imports it.
        if any(base.__name__ == name for base in type(source).__mro__):
            return source  # type: ignore[return-value]
        model_type: str | None = type(source).__name__
    else:
        model_type = _model_type(source, kwargs)
    if model_type != ViTPConfig.model_type:
        raise ValueError(
            f"the classifier is of type {model_type!r}; it must be a ViT-P ({ViTPConfig.model_type!r}): a {name}, or a "
            "folder or Hub id of one (is the order generator, classifier?)"
        )
    return ViTPForPointClassification.from_pretrained(source, **kwargs)


def oneformer_task_inputs(source: Any, sequence_length: int, **kwargs: Any) -> dict[str, list[int]]:
    """Token ids of OneFormer's prompt "the task is ..." by task, so that no tokenizer is needed later.

    Args:
        source: a OneFormerProcessor, a tokenizer, or the folder or Hub id of one.
        sequence_length: tokens per prompt, the model's `task_seq_len`; padded with 0.
        kwargs: for `from_pretrained`, such as `revision`.
    """
    where = source if isinstance(source, str | os.PathLike) else type(source).__name__
    if isinstance(source, str | os.PathLike):
        try:
            source = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub_arguments(kwargs))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source}: a OneFormer is told its task in words, and there is no tokenizer ({error}); pass "
                "task_inputs={task: token ids}, or generator_processor=OneFormerProcessor.from_pretrained(...)"
            ) from error
    tokenizer = getattr(source, "tokenizer", source)
    if not callable(tokenizer) or isinstance(tokenizer, nn.Module):
        raise ValueError(
            "a OneFormer is told its task in words: pass generator_processor=OneFormerProcessor.from_pretrained(...), "
            "or task_inputs={task: token ids}"
        )
    prompts = [f"the task is {task}" for task in TASKS]
    tokens = tokenizer(prompts, padding="max_length", max_length=sequence_length, truncation=True)
    inputs = {
        task: [int(token) * int(real) for token, real in zip(ids, mask, strict=True)]
        for task, ids, mask in zip(TASKS, tokens["input_ids"], tokens["attention_mask"], strict=True)
    }
    if len({tuple(ids) for ids in inputs.values()}) < len(TASKS):
        # Without vocabulary files Transformers makes a tokenizer that knows no words, and raises nothing.
        raise ValueError(
            f"the tokenizer of {where} cannot tell the tasks {', '.join(TASKS)} apart: its vocabulary is missing or "
            f"{sequence_length} tokens are too few; pass generator_processor=OneFormerProcessor.from_pretrained(...) "
            "or task_inputs={task: token ids}"
        )
    return inputs


def _model_type(source: Any, kwargs: dict[str, Any]) -> str | None:
    return stored_config(source, **hub_arguments(kwargs)).get("model_type")

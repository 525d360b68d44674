"""What a folder of Transformers' own EoMT image processor says, in the settings of ours.

Its preprocessor_config.json gives size, normalisation and whether pictures are cut into windows; the config.json beside
it the classes, from which follow stuff and, where all of them are things, the task.
"""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from .published_labels import find_published_labels

logger = logging.get_logger(__name__)

_PROCESSOR_TYPES = ("EomtImageProcessor", "EomtImageProcessorFast", "EomtImageProcessorPil")
# Settings that mean the same under the same name.
_SHARED_SETTINGS = (
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_split_image",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


def is_transformers_eomt_processor(settings: dict[str, Any]) -> bool:
    """Whether a preprocessor_config.json is of Transformers' own EoMT image processor."""
    return settings.get("image_processor_type") in _PROCESSOR_TYPES


def translate_image_processor(
    settings: dict[str, Any], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
) -> dict[str, Any]:
    """Settings of `EoMTImageProcessor` for a checkpoint that Transformers' processor belongs to.

    Args:
        settings: its preprocessor_config.json.
        pretrained_model_name_or_path: the folder or Hub repository that holds it, where the config.json is looked up.
        kwargs: what `from_pretrained` was given; the arguments that concern the Hub are used.

    Returns:
        Our settings, see `translated_settings`; a warning says where stuff is not known.

    Raises:
        ValueError: the size cannot be expressed here.
    """
    id2label = _id2label(pretrained_model_name_or_path, kwargs)
    ours = translated_settings(settings, id2label)
    if ours["task"] == "panoptic" and find_published_labels(id2label) is None:
        logger.warning_once(
            f"{pretrained_model_name_or_path}: its classes are those of no published data set known here, so stuff is "
            "not fused in panoptic segmentation; pass stuff_classes=[...] to from_pretrained to say which classes are"
        )
    return ours


def translated_settings(settings: Mapping[str, Any], id2label: Mapping[Any, str]) -> dict[str, Any]:
    """Settings of `EoMTImageProcessor` from those of Transformers' processor and the names of the model's classes.

    The task is semantic if pictures are cut into windows, instance if the classes are the things of a published data
    set, else panoptic; `stuff_classes` are those of the published set, or empty. There `ignore_index` also means that
    labels are counted from 1, which here is `do_reduce_labels`.

    Raises:
        ValueError: the size cannot be expressed here.
    """
    ours = {name: settings[name] for name in _SHARED_SETTINGS if settings.get(name) is not None}
    windowed = bool(settings.get("do_split_image"))
    ours["size"] = _input_size(settings.get("size") or {"shortest_edge": 640, "longest_edge": 640}, windowed)
    ignore_index = settings.get("ignore_index")
    ours["do_reduce_labels"] = bool(settings.get("do_reduce_labels", ignore_index is not None))
    if ignore_index is not None:
        ours["ignore_index"] = ignore_index

    labels = find_published_labels(id2label)
    ours["num_labels"] = len(id2label) or None
    ours["stuff_classes"] = list(labels.stuff_classes) if labels else []
    ours["task"] = "semantic" if windowed else "panoptic"
    if not windowed and labels is not None and not labels.stuff_classes:
        ours["task"] = "instance"
    return ours


def _input_size(size: Any, windowed: bool) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    if size.get("height") and size.get("width"):
        return {"height": size["height"], "width": size["width"]}
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest is None or (not windowed and longest not in (None, shortest)):
        raise ValueError(
            f"size={size}: pictures that are padded need one input size; pass size={{'height': H, 'width': W}} of the "
            "model's input to from_pretrained"
        )
    return {"height": shortest, "width": shortest}


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a `from_pretrained` that say where and how a file is fetched."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def _id2label(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> dict[str, str]:
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder, **hub_arguments(kwargs))
    except (OSError, ValueError):
        return {}  # a processor may be kept without its model
    return config.get("id2label") or {}

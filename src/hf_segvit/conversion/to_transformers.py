"""Our EoMT as a folder that stock Transformers loads, without this package: its own `eomt` or `eomt_dinov3`.

Learned positions become `eomt`, rotary ones `eomt_dinov3`. What neither can express is refused with the reason; the
written folder computes the same, which is checked by a forward pass of both.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
)

from ..atomic_files import check_destination, complete_folder
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..weight_checks import check_complete, check_weights, common_dtype
from .checkpoint_files import DEFAULT_MAX_BYTES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint
from .reference_check import compare_with_transformers
from .transformers_config import inexpressible, masked_attention_probabilities, transformers_config

_SHARED_SETTINGS = (
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_split_image",
    "do_pad",
)


def export_to_transformers(
    model_or_folder: EoMTForUniversalSegmentation | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    processor: EoMTImageProcessor | None = None,
    overwrite: bool = False,
    check: bool = True,
    revision: str | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> list[str]:
    """Write a model as a folder of Transformers' own `eomt` or `eomt_dinov3`.

    Args:
        model_or_folder: a model, or where `from_pretrained` finds one.
        destination: the folder, which appears complete or not at all.
        processor: image processor of the model; `None` takes the one of the folder, and with a model in memory that of
            the config's picture size.
        overwrite: replace a model folder that is there.
        check: compare both models' outputs on a random picture before the folder appears.
        revision: branch, tag or commit, where the source is a Hub id.
        max_bytes: cap on the size of the weights read.

    Returns:
        Lines that tell what was done and what behaves otherwise there.

    Raises:
        ValueError: Transformers cannot express the model, or the destination is taken; nothing was written.
    """
    check_destination(destination, overwrite)
    model: EoMTForUniversalSegmentation
    if isinstance(model_or_folder, EoMTForUniversalSegmentation):
        model = model_or_folder
    else:
        path = find_checkpoint(model_or_folder, SAFETENSORS_NAMES, revision)
        check_weights(read_checkpoint(path, max_bytes), str(path))
        model = EoMTForUniversalSegmentation.from_pretrained(model_or_folder, revision=revision)
        processor = processor or EoMTImageProcessor.from_pretrained(model_or_folder, revision=revision or "main")
    if processor is None:
        height, width = model.config.image_height_width
        processor = EoMTImageProcessor(size={"height": height, "width": width})
    config, notes = transformers_config(model.config)
    state_dict = transformers_state_dict(model, config, notes)
    their_processor = transformers_image_processor(processor, notes)
    their_model = transformers_class(config).from_pretrained(
        None, config=config, state_dict=state_dict, dtype=common_dtype(model.state_dict())
    )
    if check:
        notes.append(compare_with_transformers(model, their_model, tolerance=1e-5))
    with complete_folder(destination, overwrite) as folder:
        their_model.save_pretrained(folder)
        their_processor.save_pretrained(folder)
    return [f"wrote {config.model_type} to {Path(destination)}, {len(state_dict)} tensors", *notes]


def transformers_state_dict(
    model: EoMTForUniversalSegmentation, config: EomtConfig | EomtDinov3Config, notes: list[str]
) -> dict[str, Tensor]:
    """The weights of the same model in Transformers.

    Args:
        model: ours.
        config: theirs, of `transformers_config`.
        notes: told what was filled in.

    Returns:
        Their names to our tensors.

    Raises:
        ValueError: the weights do not make a whole model of theirs.
    """
    check_weights(model.state_dict(), "the model")
    renamed = {_their_name(name, config): tensor for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        expected = transformers_class(config)(config).state_dict()
    if any(".mlp.weights_in." in name for name in expected):
        renamed = _pack_gates(renamed)
    if isinstance(config, EomtConfig) and config.use_swiglu_ffn:
        notes.append(f"the gated MLPs are named as in Transformers {transformers.__version__}; other versions differ")
    probabilities = torch.tensor(masked_attention_probabilities(model.config))
    class_weights = torch.ones(len(model.class_predictor.bias))
    class_weights[-1] = model.config.no_object_weight
    renamed |= {"attn_mask_probs": probabilities, "criterion.empty_weight": class_weights}
    like = model.class_predictor.weight
    for name in expected.keys() - renamed.keys():
        if name.endswith(".k_proj.bias"):
            renamed[name] = like.new_zeros(expected[name].shape)  # keys without bias: the same function
        elif name.endswith(".lambda1"):
            renamed[name] = like.new_ones(expected[name].shape)  # blocks without LayerScale
    check_complete(renamed, expected, f"Transformers {transformers.__version__} does not have the same EoMT")
    return renamed


def transformers_class(config: EomtConfig | EomtDinov3Config) -> Any:
    """The model class of Transformers for a configuration of its."""
    return EomtForUniversalSegmentation if isinstance(config, EomtConfig) else EomtDinov3ForUniversalSegmentation


def _their_name(name: str, config: EomtConfig | EomtDinov3Config) -> str:
    name = name.removeprefix("eomt.")
    if isinstance(config, EomtConfig):
        return name
    name = name.replace("patch_embeddings.projection.", "patch_embeddings.")
    name = name.replace(".attention.out_proj.", ".attention.o_proj.")
    return name.replace(".mlp.fc1.", ".mlp.up_proj.").replace(".mlp.fc2.", ".mlp.down_proj.")


def _pack_gates(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gate and value in one matrix, as Transformers up to 5.17 has them in `eomt`."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        gate = re.fullmatch(r"(.+\.mlp\.)gate_proj\.(.+)", name)
        if gate:
            packed[f"{gate[1]}weights_in.{gate[2]}"] = torch.cat((tensor, state_dict[f"{gate[1]}up_proj.{gate[2]}"]))
        elif ".mlp.up_proj." not in name:
            packed[name.replace(".mlp.down_proj.", ".mlp.weights_out.")] = tensor
    return packed


def transformers_image_processor(processor: EoMTImageProcessor, notes: list[str]) -> EomtImageProcessor:
    """The image processor of Transformers that prepares pictures alike.

    Args:
        processor: ours.
        notes: told what is left behind.

    Raises:
        ValueError: its input is not square.
    """
    height, width = processor.size["height"], processor.size["width"]
    if height != width:
        raise inexpressible(f"an image processor for {height} x {width} pixels; its inputs are square")
    settings = {name: getattr(processor, name) for name in _SHARED_SETTINGS}
    if processor.stuff_classes:
        notes.append(
            f"pass stuff_classes={processor.stuff_classes} to its post_process_panoptic_segmentation, since its "
            "processor does not store them"
        )
    if processor.do_reduce_labels:
        settings["ignore_index"] = processor.ignore_index  # there it also means that labels are counted from 1
    size: dict[str, Any] = {"shortest_edge": height, "longest_edge": None if processor.do_split_image else height}
    return EomtImageProcessor(size=size, **settings)

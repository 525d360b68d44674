"""Convert each kind of source of `hf-segvit convert` to a model in memory.

Official EoMT and ViT-P checkpoints, Transformers' `eomt`, timm models and other backbones; each function returns a
`Converted` with the model, its image processor and what the model card says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from ..lookup import suggestion
from ..models.checkpoint_json import path_of, stored_config
from ..models.configuration_eomt import EoMTConfig
from ..models.configuration_plain_vit import PlainViTConfig
from ..models.configuration_vit_p import ViTPConfig
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.image_processing_plain_vit import PlainViTImageProcessor
from ..models.image_processing_vit_p import ViTPImageProcessor
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.modeling_plain_vit import PlainViTModel
from ..models.modeling_vit_p import ViTPForPointClassification
from ..models.published_labels import TASKS
from ..models.transformers_eomt import is_transformers_eomt, translate_state_dict
from ..weight_checks import check_complete, check_weights, common_dtype, mapping_lines
from .backbones import convert_backbone, family_for, image_normalization, is_timm_model, load_backbone
from .checkpoint_files import PICKLE_NAMES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint
from .official_catalogue import Architecture, ReleasedModel, recognise_released_model, released_model
from .official_eomt import OfficialEoMT, read_official_eomt
from .official_vit_p import OfficialViTP, read_official_vit_p
from .options import ConversionOptions, Labels, read_labels
from .to_transformers import compare_outputs, compare_with_transformers, transformers_class


@dataclass
class Converted:
    """A converted model and what is written with it.

    Attributes:
        processor: its image processor; of a backbone, one with the normalisation of its pre-training.
        lines: report of what was done.
        card: arguments of `make_model_card`.
        results: published evaluations.
    """

    model: PreTrainedModel
    processor: PlainViTImageProcessor
    lines: list[str]
    card: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)


def from_official_eomt(source: str, options: ConversionOptions) -> Converted:
    """Convert a checkpoint of the official EoMT code; see `read_official_eomt`."""
    released = _released("eomt", source, options)
    task = options.task or (released.task if released else None)
    if task is None:
        raise ValueError(
            f"{source} is not named after a released model, and its weights do not show its task; pass "
            f"--task {'|'.join(TASKS)} and --labels, or --model with the name of a released model"
        )
    labels, num_labels = _labels_asked_for(options, released)
    official = read_official_eomt(source, options, num_labels, released)
    _check_released(official, released, options)
    labels = _labels_of(official, labels)
    label2id = {name: index for index, name in labels.id2label.items()}
    try:
        config = EoMTConfig(**official.fields, id2label=labels.id2label, label2id=label2id)
    except StrictDataclassError as error:
        # Only `--set` can give a field a value of the wrong type.
        raise ValueError(f"--set: {' '.join(str(error).split())}") from error
    remedy = f"{source} is damaged, or of a backbone that is not supported"
    model = whole_model(EoMTForUniversalSegmentation, config, official.state_dict, remedy)
    lines = mapping_lines(official.state_dict) + official.notes
    height, width = config.image_height_width
    processor = EoMTImageProcessor(
        task=task,
        size={"height": height, "width": width},
        image_mean=official.pixel_mean,
        image_std=official.pixel_std,
        num_labels=config.num_labels,
        stuff_classes=(labels.stuff_classes or []) if task == "panoptic" else [],
        **(released.thresholds if released else {}),
    )
    lines.append(
        "not compared: the official code is not an installable library; the folder is read back and checked instead"
    )
    changed = "the class head is new" if options.reset_class_head else ""
    changed = changed or ("the image size was changed" if "image_size" in options.fields else "")
    return Converted(model, processor, lines, **_card_of(released, changed))


def _released(architecture: Architecture, source: str, options: ConversionOptions) -> ReleasedModel | None:
    """The released model that `--model` or the path names."""
    if options.model:
        released: ReleasedModel | None = released_model(architecture, options.model)
    else:
        released = recognise_released_model(architecture, source)
    if released is not None and released.unsupported:
        raise ValueError(f"{released.id} cannot be converted: {released.unsupported}")
    return released


def _labels_asked_for(options: ConversionOptions, released: ReleasedModel | None) -> tuple[Labels | None, int | None]:
    """The labels that the model is to have, if known, and how many the file must have or get."""
    labels = read_labels(options.labels) if options.labels else None
    if labels is None and released is not None and "num_labels" not in options.fields:
        labels = read_labels(released.labels)
    num_labels = options.fields.get("num_labels")
    if num_labels is None and labels is not None and (options.labels or options.reset_class_head):
        num_labels = len(labels.id2label)
    return labels, num_labels


def _labels_of(official: OfficialEoMT | OfficialViTP, labels: Labels | None) -> Labels:
    if labels is None:
        official.notes.append(
            f"the {official.num_labels} classes have no names; pass --labels FILE, or one of the published tables"
        )
        return Labels({index: f"LABEL_{index}" for index in range(official.num_labels)}, None, "")
    if len(labels.id2label) != official.num_labels:
        raise ValueError(
            f"{labels.title} names {len(labels.id2label)} classes, but the file's head knows {official.num_labels}"
        )
    return labels


def _check_released(
    official: OfficialEoMT | OfficialViTP, released: ReleasedModel | None, options: ConversionOptions
) -> None:
    if released is None:
        return
    # A file of another model under this name would get wrong labels and a wrong card.
    dimensions = dict(official.fields)
    if not options.reset_class_head:
        dimensions["num_labels"] = official.num_labels  # a new head may have any number
    disagreement = released.disagreement(dimensions)
    if disagreement:
        raise ValueError(
            f"this is not {released.id}, which its path or --model says: {disagreement}; name the right model with "
            "--model, or rename or move the file"
        )


def _card_of(released: ReleasedModel | None, changed: str = "") -> dict[str, Any]:
    """Card and results of a released model, whose published results hold unless something was changed."""
    if released is None:
        return {}
    data, split = {
        "coco_panoptic": ("COCO panoptic", "val2017"),
        "coco_instance": ("COCO", "val2017"),
        "ade20k": ("ADE20K", "validation"),
        "cityscapes": ("Cityscapes", "val"),
    }[released.labels]
    text = f"The training split of {data}, by the authors of EoMT (their checkpoint `{released.repository}`)"
    text += f", after training on {released.pretrained_on}." if released.pretrained_on else "."
    if released.base:
        text += (
            f" Its backbone started from `{released.base}`, whose licence (DINOv3 License) covers these weights too."
        )
    results = []
    if changed:
        text += f" Not as released: {changed}, and the model has not been trained since."
    else:
        text += " The results below are those that the authors published; they were not measured again."
        results = [{"task": released.task, "dataset": data, "split": split, "metrics": dict(released.metrics)}]
    # The DINOv3 License also covers weights that were trained from DINOv3's.
    license_id = "other" if released.base else "mit"
    card = {"training_data": text, "license": license_id, "base_model": released.repository}
    return {"card": card, "results": results}


def from_transformers_eomt(source: str, options: ConversionOptions) -> Converted:
    """Convert an `eomt` or `eomt_dinov3` checkpoint of Transformers."""
    at_revision: dict[str, Any] = {"revision": options.revision or "main"}
    raw_config = stored_config(source, **at_revision)
    if not is_transformers_eomt(raw_config):
        raise ValueError(
            f"{path_of(raw_config)}: the model is of type {raw_config.get('model_type')!r}, not of Transformers' eomt "
            "or eomt_dinov3; give a checkpoint of one of these, or another kind of conversion"
        )
    path = str(find_checkpoint(source, SAFETENSORS_NAMES + PICKLE_NAMES, options.revision))
    state_dict = read_checkpoint(path, options.max_bytes)
    check_weights(state_dict, path)
    weights, probabilities = translate_state_dict(state_dict)
    config = EoMTConfig.from_pretrained(source, **at_revision)
    if probabilities is not None:
        config.masked_attention_probabilities = probabilities
    remedy = f"{path} does not fit the config.json beside it; copy both again"
    model = whole_model(EoMTForUniversalSegmentation, config, weights, remedy)
    processor = EoMTImageProcessor.from_pretrained(source, **at_revision)
    lines = mapping_lines(model.state_dict())
    if options.labels:
        labels = read_labels(options.labels)
        if len(labels.id2label) != model.config.num_labels:
            raise ValueError(
                f"{options.labels} names {len(labels.id2label)} classes, the model has {model.config.num_labels}"
            )
        model.config.id2label = labels.id2label
        model.config.label2id = {name: index for index, name in labels.id2label.items()}
        if labels.stuff_classes is not None:
            processor.stuff_classes = labels.stuff_classes
    if options.task:
        # `None`: whether images are split into windows follows from the task.
        settings = processor.to_dict() | {"task": options.task, "do_split_image": None}
        processor = EoMTImageProcessor(**settings)
    if options.check:
        lines.append(_compared_with_transformers(model, state_dict, source, at_revision))
    else:
        lines.append("not compared, as asked")
    return Converted(model, processor, lines, **_card_of(recognise_released_model("eomt", source)))


def _compared_with_transformers(
    model: EoMTForUniversalSegmentation, state_dict: dict[str, torch.Tensor], source: str, at_revision: dict[str, Any]
) -> str:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **at_revision)
    theirs, loading = transformers_class(config).from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True
    )
    if loading["missing_keys"]:
        # Checkpoints with other names of a gated MLP load there with random numbers instead of its weights.
        return f"not compared: this version of Transformers does not find {min(loading['missing_keys'])} in it"
    return compare_with_transformers(model, theirs, tolerance=1e-4)


def whole_model(cls: Any, config: PlainViTConfig, state_dict: dict[str, torch.Tensor], remedy: str) -> Any:
    """A model with exactly these weights, in their precision; an error about others ends with `remedy`."""
    # On meta, names and shapes cost no memory.
    with torch.device("meta"):
        expected = cls(config).state_dict()
    check_complete(state_dict, expected, remedy)
    return cls.from_pretrained(None, config=config, state_dict=state_dict, dtype=common_dtype(state_dict))


def from_timm(source: str, options: ConversionOptions) -> Converted:
    """Convert a backbone of timm: `timm/NAME` is downloaded, a file needs `options.model` to name its model."""
    lines: list[str] = []
    sizes = _sizes(options)
    reference = _timm_model(source, options, lines)
    return _backbone(reference, reference.state_dict(), image_normalization(reference), sizes, options, lines)


def from_any_backbone(source: str, options: ConversionOptions) -> Converted:
    """Convert any source that `from_backbone` takes, including families of other packages."""
    sizes = _sizes(options)
    reference, weights = load_backbone(source, with_weights=True)
    weights = reference.state_dict() if weights is None else weights
    return _backbone(reference.eval(), weights, image_normalization(source), sizes, options, [])


def _sizes(options: ConversionOptions) -> dict[str, Any]:
    unknown = options.fields.keys() - {"image_size", "patch_size"}
    if unknown:
        raise ValueError(f"--set {sorted(unknown)[0]}: for a backbone only image_size and patch_size can be set")
    return {name: options.fields.get(name) for name in ("image_size", "patch_size")}


def _backbone(
    reference: Any,
    weights: Mapping[str, torch.Tensor],
    normalization: tuple[list[float], list[float]],
    sizes: dict[str, Any],
    options: ConversionOptions,
    lines: list[str],
) -> Converted:
    # Compared at the source's own size: its code may resample positions otherwise.
    native_fields, native_weights = convert_backbone(reference, state_dict=weights)
    model = _plain_vit(native_fields, native_weights)
    lines += mapping_lines(native_weights)
    lines.append(_compared(model, reference) if options.check else "not compared, as asked")
    if any(sizes.values()):
        del model, native_weights  # two of a 7B at once would need twice the memory
        model = _plain_vit(*convert_backbone(reference, **sizes, state_dict=weights))
        lines.append(f"resampled to image_size={model.config.image_size}, patch_size={model.config.patch_size}")
    height, width = model.config.image_height_width
    mean, std = normalization
    processor = EoMTImageProcessor(size={"height": height, "width": width}, image_mean=mean, image_std=std)
    return Converted(model, processor, lines)


def _timm_model(source: str, options: ConversionOptions, lines: list[str]) -> torch.nn.Module:
    name = (options.model or source).removeprefix("timm/")
    architecture = name.partition(".")[0]
    check_timm_name(name)
    if not Path(source).exists():
        if options.model is not None and not is_timm_model(source.removeprefix("timm/").partition(".")[0]):
            raise ValueError(f"there is no file or folder {source}, nor a timm model of this name; check the path")
        return timm.create_model(name, pretrained=True, num_classes=0).eval()
    path = find_checkpoint(source)
    state_dict = read_checkpoint(path, options.max_bytes)
    check_weights(state_dict, str(path))
    model = timm.create_model(name, num_classes=0)
    for parameter in [parameter for parameter in state_dict if parameter.startswith("head.")]:
        # timm builds the model without a classifier, whatever the file was trained for.
        del state_dict[parameter]
        lines.append(f"left out {parameter}: classifier")
    check_complete(
        state_dict, model.state_dict(), f"{path} does not hold the weights of timm's {architecture}; check --model"
    )
    model.load_state_dict(state_dict)
    return model.eval()


def check_timm_name(name: str) -> None:
    """Refuse a name that no model of timm has, with or without a tag, naming the nearest."""
    architecture = name.partition(".")[0]
    if not is_timm_model(architecture):
        near = suggestion(architecture, timm.list_models(), 3, "timm.list_models() has all")
        raise ValueError(f"timm has no model {name!r}; {near}")


def _plain_vit(fields: dict[str, Any], weights: dict[str, torch.Tensor]) -> PlainViTModel:
    return PlainViTModel.from_pretrained(
        None, config=PlainViTConfig(**fields), state_dict=weights, dtype=common_dtype(weights)
    )


@torch.no_grad()
def _compared(model: PlainViTModel, reference: Any) -> str:
    family, backbone, _ = family_for(reference)
    features = getattr(family, "features", None)
    generator = torch.Generator().manual_seed(0)
    # Noise: every weight matters, and no data is needed.
    pixel_values = torch.randn(1, model.config.num_channels, *model.config.image_height_width, generator=generator)
    pixel_values = pixel_values.to(model.dtype)
    theirs = None if features is None else features(backbone, pixel_values)
    if theirs is None:
        return f"not compared: {family.FAMILY} has no features of whole images to compare with"
    pairs = {"last_hidden_state": (model.eval()(pixel_values).last_hidden_state, theirs)}
    return compare_outputs(pairs, tolerance=1e-4, reference=family.FAMILY)


def from_official_vit_p(source: str, options: ConversionOptions) -> Converted:
    """Convert a checkpoint of the official ViT-P code; see `read_official_vit_p`."""
    released = _released("vit_p", source, options)
    official = read_official_vit_p(source, options, released)
    _check_released(official, released, options)
    count = options.fields.get("num_labels", official.num_labels)
    if count != official.num_labels:
        raise ValueError(f"--set num_labels={count}: the file's head knows {official.num_labels} classes")
    given = options.labels or (released.labels if released else None)
    labels = _labels_of(official, read_labels(given) if given else None)
    label2id = {name: index for index, name in labels.id2label.items()}
    config = ViTPConfig(**official.fields, id2label=labels.id2label, label2id=label2id)
    remedy = f"{source} is damaged, or of another backbone than the official code's"
    model = whole_model(ViTPForPointClassification, config, official.state_dict, remedy)
    height, width = official.image_size
    processor = ViTPImageProcessor(
        size={"height": height, "width": width},
        patch_size=config.patch_size,
        point_origin=config.point_origin,
        id2label=labels.id2label,
    )
    lines = mapping_lines(official.state_dict) + official.notes
    if released is None:
        return Converted(model, processor, lines)
    lines.append(f"published for the masks of {released.generator} on {labels.title}")
    text = (
        f"The training split of {released.label_table.title}, by the authors of ViT-P (their file `{released.id}.pth` "
        f"of `{released.repository}`), for the masks of {released.generator}. They do not state a licence of the "
        "weights."
    )
    return Converted(model, processor, lines, card={"training_data": text, "base_model": released.repository})

"""Official ViT-P weights as a model in memory, with its image processor; `official_vit_p.py` reads the file."""

from typing import Any

from ..models.configuration_vit_p import ViTPConfig
from ..models.image_processing_vit_p import ViTPImageProcessor
from ..models.modeling_vit_p import ViTPForPointClassification
from ..weight_checks import mapping_lines
from .conversion_options import ConversionOptions, Labels, read_labels
from .convert_sources import Converted, whole_model
from .official_vit_p import OfficialViTP, read_official_vit_p
from .official_vit_p_catalogue import REPOSITORY, ReleasedViTP, recognise_released_vit_p, released_vit_p


def from_official_vit_p(source: str, options: ConversionOptions) -> Converted:
    """A checkpoint of the official ViT-P code; see `read_official_vit_p`.

    Raises:
        ValueError: see there; also if the file is not the released model that it is called, or the labels do not fit.
    """
    released = released_vit_p(options.model) if options.model else recognise_released_vit_p(source)
    official = read_official_vit_p(source, options, released)
    if released is not None:
        disagreement = released.disagreement({**official.fields, "num_labels": official.num_labels})
        if disagreement:
            raise ValueError(
                f"this is not {released.file}, which its path or --model says: {disagreement}; rename the file, or "
                "name the right model with --model"
            )
    labels = _labels(official, options, released)
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
    if released is not None:
        lines.append(f"published for the masks of {released.generator} on {labels.title}")
    return Converted(model, processor, lines, card=_card(released))


def _card(released: ReleasedViTP | None) -> dict[str, Any]:
    if released is None:
        return {}
    text = (
        f"The training split of {released.label_table.title}, by the authors of ViT-P (their file `{released.file}` of "
        f"`{REPOSITORY}`), for the masks of {released.generator}. They do not state a licence of the weights."
    )
    return {"training_data": text, "base_model": REPOSITORY}


def _labels(official: OfficialViTP, options: ConversionOptions, released: ReleasedViTP | None) -> Labels:
    given = options.labels or (released.labels if released else None)
    count = options.fields.get("num_labels", official.num_labels)
    if count != official.num_labels:
        raise ValueError(f"--set num_labels={count}: the file's head knows {official.num_labels} classes")
    if given is None:
        official.notes.append(
            f"the {official.num_labels} classes have no names; pass --labels FILE, or one of the published tables"
        )
        return Labels({index: f"LABEL_{index}" for index in range(official.num_labels)}, None, "")
    labels = read_labels(given)
    if len(labels.id2label) != official.num_labels:
        raise ValueError(
            f"{labels.title} names {len(labels.id2label)} classes, the file's head knows {official.num_labels}"
        )
    return labels

"""Configuration of ViT-P fusion: generator, classifier, how they are joined.

Both parts keep their own configuration, `generator_config` and `classifier_config`. The generator may be EoMT of this
package or any universal segmentation model of Transformers with Mask2Former's outputs. The fused model has its classes.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .checkpoint_json import StoredConfig, check_fields, check_foreign_fields, errors_name, path_of, shown
from .class_fusion import NORMALIZATIONS, check_alpha
from .configuration_eomt import EoMTConfig
from .configuration_mask2former_vit import Mask2FormerViTConfig
from .configuration_plain_vit import replace_labels
from .configuration_vit_p import ViTPConfig
from .image_processing_eomt import TASKS
from .label_spaces import LABEL_MISMATCHES, match_names
from .published_labels import find_published_labels

OFFICIAL_GEOMETRIES = ("oneformer", "internimage")


@strict
class ViTPFusionConfig(StoredConfig):
    """Configuration of `ViTPFusionForUniversalSegmentation`.

    Args:
        generator_config: of the generator, or its fields with `model_type`.
        classifier_config: of the ViT-P, or its fields.
        task: `"panoptic"`, `"instance"` or `"semantic"`: the default for calls without one, such as the pipeline's. It
            selects alpha, and the prompt of a OneFormer.
        alpha: weight of ViT-P in [0, 1], or one for each task.
        normalization: `"oneformer"` or `"internimage"`; see `fuse_class_logits`.
        label_mismatch: `"error"` demands the same classes in both parts; `"keep"` fuses those that they share.
        stuff_classes: ids of the stuff classes; `None`: those of the published label set with these classes, if any.
        task_inputs: token ids of OneFormer's prompt for each task; other generators need none.
        official_geometry: `"oneformer"` or `"internimage"` positions points like the official code, including its
            offsets; for comparisons.
        id2label: names of the fused classes; `None`: the generator's.
    """

    model_type = "segvit_vit_p_fusion"
    has_no_defaults_at_init = True
    sub_configs = {"generator_config": AutoConfig, "classifier_config": ViTPConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "generator_class_queries_logits",
        "prompt_logits",
        "prompts",
        "content_sizes",
        "patch_offsets",
        "input_sizes",
    ]

    generator_config: dict | PreTrainedConfig | None = None
    classifier_config: dict | PreTrainedConfig | None = None
    task: str = "panoptic"
    alpha: float | int | dict[str, float | int] = 0.4
    normalization: str = "oneformer"
    label_mismatch: str = "error"
    stuff_classes: list[int] | None = None
    task_inputs: dict[str, list[int]] | None = None
    official_geometry: str | None = None

    def __post_init__(self, **kwargs: Any):
        if self.generator_config is None or self.classifier_config is None:
            raise ValueError(
                "a fused model needs generator_config and classifier_config; "
                "ViTPFusionForUniversalSegmentation.from_generator_and_classifier makes it from two models"
            )
        self.generator_config = _sub_config(self.generator_config)
        self.classifier_config = _sub_config(self.classifier_config)
        if self.classifier_config.model_type != ViTPConfig.model_type:
            raise ValueError(
                f"classifier_config is of type {self.classifier_config.model_type!r}; the classifier must be a ViT-P "
                f"({ViTPConfig.model_type!r})"
            )
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = dict(self.generator_config.id2label or {})
        super().__post_init__(**kwargs)
        # After `super`, which turns the keys of id2label from JSON's strings into numbers.
        if self.stuff_classes is None:
            published = find_published_labels(self.id2label or {})
            self.stuff_classes = list(published.stuff_classes) if published else []
        self.stuff_classes = sorted(set(self.stuff_classes))
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of saved fields; `num_labels` or `id2label` replace the classes of all parts."""
        where = path_of(config_dict, kwargs.get("name_or_path"))
        check_fields(cls, config_dict, where)
        for part in ("generator_config", "classifier_config"):
            _check_part(config_dict.get(part), where, part)
        with errors_name(where):
            fields, kwargs = replace_labels(config_dict, kwargs)
            if fields is not config_dict:
                fields = _relabelled(fields, config_dict)
            return super().from_dict(fields, **kwargs)

    def alpha_of(self, task: str) -> float:
        """Weight of ViT-P for a task."""
        return float(self.alpha[task] if isinstance(self.alpha, dict) else self.alpha)

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved."""
        fields = super().to_dict()
        for part in ("generator_config", "classifier_config"):
            fields[part] = _without_origin(fields[part])
        # A folder saved without the code must not name it, or loading would look for the missing files.
        if self._auto_class is None:
            fields.pop("auto_map", None)
        return fields

    def check(self) -> None:
        """Refuse contradictory fields with a ValueError that names the field, its value and the remedy."""
        for name, choices in (
            ("task", TASKS),
            ("normalization", NORMALIZATIONS),
            ("label_mismatch", LABEL_MISMATCHES),
            ("official_geometry", (None, *OFFICIAL_GEOMETRIES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}")
        if isinstance(self.alpha, dict):
            if set(self.alpha) != set(TASKS):
                raise ValueError(
                    f"alpha={self.alpha} must have one weight for each of {', '.join(TASKS)}, or be one number"
                )
            for value in self.alpha.values():
                check_alpha(value)
        else:
            check_alpha(self.alpha)
        assert isinstance(self.generator_config, PreTrainedConfig)  # made above
        num_classes, num_generator_classes = len(self.id2label or {}), len(self.generator_config.id2label or {})
        if num_classes != num_generator_classes:
            raise ValueError(
                f"id2label names {num_classes} classes, but the generator has {num_generator_classes}; "
                "the fused model has the generator's classes, so leave id2label out or rename all of them"
            )
        if any(not 0 <= label < num_classes for label in self.stuff_classes or ()):
            raise ValueError(f"stuff_classes={self.stuff_classes} are not all among the classes 0 to {num_classes - 1}")
        if self.task_inputs is not None and set(self.task_inputs) != set(TASKS):
            raise ValueError(
                f"task_inputs has prompts for {sorted(self.task_inputs)}; it needs one for each of {', '.join(TASKS)}"
            )


# Of parts that are models of this package.
_OUR_CONFIGS = (EoMTConfig, Mask2FormerViTConfig, ViTPConfig)


def _check_part(fields: Any, where: str, part: str) -> None:
    """Refuse stored fields of a part as those of the whole are refused."""
    if isinstance(fields, PreTrainedConfig):  # not from a file
        return
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{where}: {part} is {shown(fields)}, not the configuration of a model with its model_type")
    ours = {config_class.model_type: config_class for config_class in _OUR_CONFIGS}
    if fields["model_type"] in ours:
        check_fields(ours[fields["model_type"]], fields, where, f"{part}.")
    else:
        # The weights of all parts are in one folder, so nothing is to be fetched for them wherever it lies.
        check_foreign_fields(fields, where, local=True, prefix=f"{part}.")


def _relabelled(fields: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Fields with new classes, given to the saved parts too, whose heads have to fit."""
    new = fields["id2label"]
    old = {int(label): name for label, name in (saved.get("id2label") or {}).items()}
    generator, classifier = dict(fields["generator_config"]), dict(fields["classifier_config"])
    names = dict(new)
    if len(old) != len(new):
        # Numbers of other classes; None looks them up among the published label sets.
        fields = {**fields, "stuff_classes": None}
    elif classifier.get("id2label"):
        # As many as before: only names change, and those of the classifier, whose order may differ, with them.
        names = {int(label): name for label, name in classifier["id2label"].items()}
        names |= {theirs: new[ours] for ours, theirs in match_names(old, names).items()}
    for part, labels in ((generator, new), (classifier, names)):
        part.pop("num_labels", None)
        part |= {"id2label": dict(labels), "label2id": {name: label for label, name in labels.items()}}
    return {**fields, "generator_config": generator, "classifier_config": classifier}


def _without_origin(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a part without local folders and the names of its own remote code, at any depth."""
    return {
        name: _without_origin(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in ("_name_or_path", "auto_map")
    }


def _sub_config(fields: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of a part."""
    if isinstance(fields, PreTrainedConfig):
        return fields
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("generator_config and classifier_config must say their model_type, as config.json does")
    # By class, because ours need not be registered with the Auto classes, such as in a checkpoint's own code.
    for config_class in _OUR_CONFIGS:
        if model_type == config_class.model_type:
            return config_class(**fields)
    return AutoConfig.for_model(model_type, **fields)

"""Train EoMT: from scratch, a backbone or a checkpoint; loss and annealing.

Data and scores are those of segmentation.py. `QueryTask` is what EoMT shares with Mask2Former on a plain ViT
(mask2former_vit.py).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from ...data.outliers import OutlierObjects, OutlierPasting
from ...inference.loading import load_segmentation_model
from ...lookup import import_object
from ...models.mask_criterion import MaskCriterion
from ...models.modeling_eomt import EoMTForUniversalSegmentation
from ..declarations import EoMTDeclaration, OutlierOptions, QueryDeclaration
from ..derivation import image_size, model_fields
from ..recipe import CRITERION_METHODS, Recipe
from ..start import backbone_pixel_settings, carry_over_classes, channel_statistics, load_changed, pixel_settings
from . import check_model_config, config_errors, missing_weights_explained
from .segmentation import SegmentationTask

# A checkpoint keeps these, or its scores would change without any training.
_POST_PROCESSING_SETTINGS = (
    "threshold",
    "mask_threshold",
    "overlap_mask_area_threshold",
    "instance_threshold",
    "num_instances",
)


class QueryTask(QueryDeclaration, SegmentationTask):
    """Training of a model of queries whose masked attention may be annealed; see `TrainingTask` for the methods.

    Attributes:
        model_class: a subclass of the task may set a model with another head.
        own_model_class: the model of this package that it derives from, whose configuration is all known.
        layers: what the layers with masked attention are called.
        criterion_class: the recipe's `criterion`; `None` keeps the model's own.
    """

    model_class: type[Any]
    own_model_class: type[Any]
    layers: str

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        path = recipe.criterion
        self.criterion_class = None if path is None else import_object(path, "criterion", CRITERION_METHODS)
        # An imported criterion or another model may have settings that our configuration does not know.
        others = path is not None or self.model_class is not self.own_model_class
        check_model_config(recipe.model_config, self._config_class, others)

    def build_model(self) -> tuple[Any, Any]:
        """The model with the classes of the training data, and a processor for its input size."""
        recipe = self.recipe
        fields, own = {**model_fields(recipe), **self.labels}, dict[str, Any]()
        for name in fields.keys() - self._declared_fields():
            own[name] = fields.pop(name)
        if recipe.image_size is not None:
            fields["image_size"] = recipe.image_size
        kept: dict[str, Any] = {}
        start = recipe.init or recipe.backbone
        sizes = {} if start is None else self.stand_in(start)
        if sizes is not None:
            size = list(self.size) if self.size[0] != self.size[1] else self.size[0]
            if start is not None:  # as the packaged checkpoints have them
                sizes |= model_fields(recipe.changed(init=None, backbone=None), sizes["num_hidden_layers"])
            else:
                self._remark_derived_width(fields)
            with config_errors(), torch.device("meta" if start is not None else "cpu"):
                model = self.model_class(self._config_class(**{"image_size": size, **sizes, **fields}))
        elif recipe.init is not None:
            with missing_weights_explained():
                model, kept = self._from_checkpoint(fields)
        else:
            kept, remarks = backbone_pixel_settings(start)
            self.remarks += remarks
            size = fields.pop("image_size", self.size)
            with missing_weights_explained():
                model = self.model_class.from_backbone(self.backbone, image_size=size, **fields)
        for name, value in own.items():
            setattr(model.config, name, value)
        if getattr(model.config, "token_merging_threshold", None) is not None:
            raise ValueError(
                f"token_merging_threshold={model.config.token_merging_threshold} of {start or 'model_config'}: token "
                "merging is for inference; train with model_config.token_merging_threshold=null, and turn it on in the "
                "trained model"
            )
        if own or self.criterion_class is not None:  # built anew, as it was made before these settings were there
            model.criterion = (self.criterion_class or type(model.criterion)).from_config(model.config)
        self._set_further_losses(model.criterion)
        self.size = image_size(recipe, model.config)
        self.take_channels(model.config.num_channels)
        return model, self.new_processor(**{**kept, **channel_statistics(kept, model.config.num_channels)})

    def _training_augmentation(self) -> Any:
        chosen = self.recipe.outliers
        if chosen is None:
            return super()._training_augmentation()
        options = OutlierOptions(**chosen)
        try:
            objects = OutlierObjects(options.data, options.split, known=self.description.id2label.values())
        except ValueError as error:
            raise ValueError(f"outliers.data: {error}") from error
        first, last = options.scale_range
        return OutlierPasting(
            self._augmentation(scale_later=False), objects, options.probability, options.max_objects, (first, last)
        )

    def _set_further_losses(self, criterion: Any) -> None:
        """Give the criterion the recipe's losses for the unknown."""
        recipe = self.recipe
        if recipe.logit_norm is None and recipe.outliers is None:
            return
        if not isinstance(criterion, MaskCriterion):
            raise ValueError(
                f"logit_norm and outliers are losses of MaskCriterion, not of criterion={recipe.criterion}; derive "
                "from it, or set them to null"
            )
        criterion.logit_norm_temperature = recipe.logit_norm
        criterion.outlier_weight = 0.0 if recipe.outliers is None else OutlierOptions(**recipe.outliers).weight

    def normalizers(self, model: Any, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Matched masks and class weights of all micro-batches and processes."""
        labels = [labels for batch in batches for labels in batch["class_labels"]]
        return model.criterion.count_normalizers(labels, model.config.num_queries, device)

    def loss(self, model: Any, batch: Mapping[str, Any], normalizers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms by layer, under the names of the criterion."""
        outputs = model(**batch, loss_normalizers=normalizers)
        curve_name = extract_model_from_parallel(model).criterion.curve_name
        return outputs.loss, {curve_name(name): value for name, value in outputs.loss_dict.items()}

    def before_step(self, model: Any, step: int, plan: Any) -> dict[str, float]:
        """Anneal masked attention."""
        if plan.annealing is None:
            return {}
        probabilities = plan.annealing.probabilities(step)
        model.set_masked_attention_probabilities(probabilities)
        return {f"annealing/{self.layers} {layer + 1}": value for layer, value in enumerate(probabilities)}

    def not_comparable_yet(self, model: Any) -> str | None:
        """Evaluations count once annealing is over."""
        # In evaluation a layer is masked if its probability is at least 0.5, so scores jump while it is annealed.
        probabilities = model.config.masked_attention_probabilities
        if self.recipe.annealing is False or not model.config.masked_attention or not any(probabilities):
            return None
        shown = ", ".join(f"{probability:.2f}" for probability in probabilities)
        return f"masked attention is still being annealed (probabilities {shown})"

    def model_card(self, model: Any, processor: Any, results: Sequence[Mapping[str, Any]], about: str) -> str:
        """The detailed card."""
        return self.released_card(model, processor, results, about)

    @property
    def _config_class(self) -> type[Any]:
        return self.model_class.config_class

    def _declared_fields(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self._config_class)} | {"num_labels"}

    @abstractmethod
    def _load(self, source: str) -> tuple[Any, Any]:
        """The model and image processor of a checkpoint."""

    def _from_checkpoint(self, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The starting checkpoint with the fields of the recipe, and the settings of its processor to keep."""
        before, processor = self._load(str(self.recipe.init))  # also for its errors, which name the remedy
        model, remarks = load_changed(self.model_class, str(self.recipe.init), before, "class_predictor.", fields)
        labels_before = {int(label): str(name) for label, name in (before.config.id2label or {}).items()}
        remark = carry_over_classes(model.class_predictor, before.class_predictor, fields["id2label"], labels_before)
        self.remarks += remarks if remark is None else [*remarks, remark]
        if self.recipe.annealing is not False and model.config.masked_attention:
            model.set_masked_attention_probabilities(1.0)  # a trained checkpoint has 0.0 saved, but is annealed again
        # Task, size and labels are not kept: they are the recipe's and the data's.
        kept = {name: getattr(processor, name) for name in _POST_PROCESSING_SETTINGS}
        return model, {**pixel_settings(processor), **kept}


class EoMTTask(EoMTDeclaration, QueryTask):
    """Training of `EoMTForUniversalSegmentation`; see `QueryTask`."""

    model_class = own_model_class = EoMTForUniversalSegmentation
    layers = "query layer"

    def _load(self, source: str) -> tuple[Any, Any]:
        return load_segmentation_model(source)

"""ViT-P fusion: a frozen generator proposes masks, ViT-P names them.

In order: the output, the model, and `classify_rows`, which asks ViT-P (CVPR 2026) about many rows at once. The
generator is EoMT or a Mask2Former on a plain ViT of this package, or EoMT, EoMT-DINOv3, Mask2Former, MaskFormer or
OneFormer of Transformers. The formula is in `class_fusion.py`, the points are in `mask_points.py`.

Shapes: B images, R rows of the generator's outputs (an image or a window each), Q queries of a row, C classes without
no-object, K classes of ViT-P, H W pixels of the generator's input, h w mask cells.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForUniversalSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .checkpoint_guard import checked_arguments, exported_model
from .class_fusion import check_alpha, fuse_class_logits, queries_that_matter
from .configuration_eomt import EoMTConfig
from .configuration_mask2former_vit import Mask2FormerViTConfig
from .configuration_vit_p_fusion import ViTPFusionConfig
from .fusion_sources import Source, classifier_of, generator_of, oneformer_task_inputs
from .image_processing_eomt import TASKS
from .label_spaces import match_label_spaces
from .mask2former_annealing import restore_mask_annealing
from .mask_points import official_query_points, query_points
from .modeling_eomt import EoMTForUniversalSegmentation
from .modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from .modeling_plain_vit import misfits_name_the_flag
from .modeling_vit_p import ViTPForPointClassification

logger = logging.get_logger(__name__)


@dataclass
class ViTPFusionOutput(ModelOutput):
    """Output of `ViTPFusionForUniversalSegmentation`, as every Mask2Former-style post-processor takes it."""

    class_queries_logits: Tensor | None = None  # (R, Q, C + 1) float32, fused, no-object last
    masks_queries_logits: Tensor | None = None  # (R, Q, h, w) of the generator, before the sigmoid
    generator_class_queries_logits: Tensor | None = None  # (R, Q, C + 1), not fused
    prompt_logits: Tensor | None = None  # (R, Q, K) of ViT-P, NaN where it was not asked; None with alpha 0
    prompts: Tensor | None = None  # (R, Q, 4) in [0, 1] of the whole image; None with alpha 0
    # For post-processing: the first two are passed through from the image processor.
    content_sizes: Tensor | None = None  # (B, 2)
    patch_offsets: Tensor | None = None  # (R, 3)
    input_sizes: Tensor | None = None  # (R, 2) int64 height and width of the generator's input


class ViTPFusionForUniversalSegmentation(PreTrainedModel):
    """A frozen generator of masks whose labels ViT-P corrects; see `from_generator_and_classifier`."""

    config: ViTPFusionConfig
    config_class = ViTPFusionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: ViTPFusionConfig):
        super().__init__(config)
        assert isinstance(config.generator_config, PreTrainedConfig)
        self.generator = _generator_from_config(config.generator_config)
        self.classifier = ViTPForPointClassification(config.classifier_config)  # type: ignore[arg-type]
        self._adopt()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of both parts.

        For a new label set pass `num_labels=...` or `id2label=...` with `ignore_mismatched_sizes=True`, which resets
        the class heads of both.
        """
        exported = exported_model(cls, pretrained_model_name_or_path, kwargs)
        if exported is not None:
            return exported
        kwargs = checked_arguments(cls, pretrained_model_name_or_path, kwargs)
        with misfits_name_the_flag(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_generator_and_classifier(
        cls,
        generator: Source,
        classifier: Source,
        alpha: float | dict[str, float] = 0.4,
        *,
        generator_processor: Any = None,
        generator_kwargs: dict[str, Any] | None = None,
        classifier_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "ViTPFusionForUniversalSegmentation":
        """Join two trained models, in evaluation mode.

        `ViTPFusionImageProcessor` has a method of the same name for their image processors.

        Args:
            generator: a model with the outputs of Mask2Former, or a folder or Hub id of one. A model is not copied: it
                becomes part of the fused one, frozen.
            classifier: a ViT-P, or a folder or Hub id of one; not copied either.
            alpha: weight of ViT-P in [0, 1], or one for each task.
            generator_processor: the OneFormerProcessor of a OneFormer given as a model, for the words of its prompts.
            generator_kwargs: for the generator's `from_pretrained`, such as `revision` or `dtype`.
            classifier_kwargs: the same for the classifier.
            settings: other fields of `ViTPFusionConfig`.
        """
        generator_kwargs = generator_kwargs or {}
        classifier_model = classifier_of(classifier, **(classifier_kwargs or {}))
        generator_model = generator_of(generator, **generator_kwargs)
        generator_config, classifier_config = generator_model.config, classifier_model.config
        if generator_config.model_type == "oneformer" and settings.get("task_inputs") is None:
            tokens = generator if generator_processor is None else generator_processor
            settings["task_inputs"] = oneformer_task_inputs(tokens, generator_config.task_seq_len, **generator_kwargs)
        config = cls.config_class(
            generator_config=generator_config, classifier_config=classifier_config, alpha=alpha, **settings
        )
        # The parts exist already; on the meta device their stand-ins take neither memory nor time to initialise.
        with torch.device("meta"):
            model = cls(config)
        model.generator, model.classifier = generator_model, classifier_model
        model._adopt()
        if model.label_match.description:
            logger.warning(
                f"{sum(match >= 0 for match in model.label_match.class_matches)} classes are fused; "
                f"{model.label_match.description}"
            )
        return model.eval()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Called by Transformers for classes from a checkpoint's own code."""
        super().register_for_auto_class(auto_class)
        # The image segmentation pipeline accepts only models that this table names.
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.setdefault(ViTPFusionConfig.model_type, cls.__name__)

    def _adopt(self) -> None:
        """Freeze the generator, keep one configuration for each part, and match the classes."""
        self.train(self.training)
        self.config.generator_config = self.generator.config
        self.config.classifier_config = self.classifier.config
        self.label_match = match_label_spaces(
            self.config.id2label or {}, self.classifier.config.id2label or {}, self.config.label_mismatch
        )

    def train(self, mode: bool = True) -> "ViTPFusionForUniversalSegmentation":
        """Set the classifier's mode; the generator stays frozen and in evaluation mode."""
        super().train(mode)
        # Frozen here, because `from_pretrained` replaces all parameters and then calls this.
        self.generator.eval().requires_grad_(False)
        return self

    def optimize_for_inference(
        self,
        *,
        fuse_qkv: bool | None = None,
        channels_last: bool | None = None,
        compile: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> "ViTPFusionForUniversalSegmentation":
        """Make inference of both parts faster, as `EoMTForUniversalSegmentation.optimize_for_inference` says.

        The classifier is not compiled, as its number of prompts differs between images, and all masks are decoded, as
        its prompts are points in them. A generator of Transformers stays as it is.
        """
        switches = {"fuse_qkv": fuse_qkv, "channels_last": channels_last}
        compilation = {"compile": compile, "cuda_graphs": cuda_graphs}
        if isinstance(self.generator, EoMTForUniversalSegmentation):
            self.generator.optimize_for_inference(**switches, prune_masks=False, **compilation)
        elif isinstance(self.generator, Mask2FormerViTForUniversalSegmentation):
            self.generator.optimize_for_inference(**switches, **compilation)
        elif compile or cuda_graphs:
            raise ValueError(
                f"compile=True is for generators of this package; compile the {type(self.generator).__name__} itself, "
                "or leave it out"
            )
        self.classifier.optimize_for_inference(**switches)
        return self.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns the classifier's pixels into tokens."""
        return self.classifier.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        classifier_pixel_values: Tensor | None = None,
        content_sizes: Tensor | None = None,
        task: str | None = None,
        alpha: float | None = None,
        pruning_threshold: float | None = None,
        pixel_mask: Tensor | None = None,
        patch_offsets: Tensor | None = None,
        original_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> ViTPFusionOutput:
        """Segment images.

        Args:
            pixel_values: (R, 3, H, W) input of the generator.
            classifier_pixel_values: (B, 3, height, width) whole images for ViT-P, without padding; none with alpha 0.
            content_sizes: (B, 2) height and width of the scaled images in pixels of the generator's input, before
                padding or cutting; `None`: they fill it.
            task: `"panoptic"`, `"instance"` or `"semantic"`; `None`: the config's.
            alpha: weight of ViT-P; `None`: the config's for the task.
            pruning_threshold: with isolated prompts, skip queries that cannot affect a result of this task with this
                threshold or a higher one, by `queries_that_matter`. `None` asks about all, as joint prompts always do.
            pixel_mask: (R, H, W) where the image is, for generators that take it.
            patch_offsets: (R, 3) windows, ordered by image: image, first pixel, pixel behind the last.
            original_sizes: (B, 2) sizes of the images as given, for `official_geometry="oneformer"`.
        """
        _refuse_unknown(kwargs)
        task = self.config.task if task is None else task
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not one of {', '.join(map(repr, TASKS))}")
        alpha = self.config.alpha_of(task) if alpha is None else alpha
        check_alpha(alpha)
        class_logits, mask_logits = self._generate(pixel_values, pixel_mask, task)
        input_size = (int(pixel_values.shape[-2]), int(pixel_values.shape[-1]))
        fused, prompts, prompt_logits = class_logits.float(), None, None
        if alpha > 0:
            images = _check_images(classifier_pixel_values, content_sizes, patch_offsets, len(pixel_values))
            points = self._points(mask_logits, input_size, content_sizes, patch_offsets, original_sizes)
            prompts = torch.cat((points, torch.zeros_like(points)), dim=-1)
            wanted = None
            if pruning_threshold is not None and self.classifier.config.prompt_attention == "isolated":
                wanted = queries_that_matter(class_logits, task, pruning_threshold)
            image_of_row = None if patch_offsets is None else patch_offsets[:, 0].long()
            prompt_logits = classify_rows(self.classifier, images, prompts, image_of_row, wanted)
            fused = self.fuse(class_logits, prompt_logits, alpha=alpha)
        return ViTPFusionOutput(
            class_queries_logits=fused,
            masks_queries_logits=mask_logits,
            generator_class_queries_logits=class_logits,
            prompt_logits=prompt_logits,
            prompts=prompts,
            content_sizes=content_sizes,
            patch_offsets=patch_offsets,
            input_sizes=torch.tensor(input_size, device=pixel_values.device).expand(len(pixel_values), 2),
        )

    def fuse(
        self, class_queries_logits: Tensor, prompt_logits: Tensor, alpha: float | None = None, task: str | None = None
    ) -> Tensor:
        """Fuse again, with another alpha, without running a model.

        Takes `generator_class_queries_logits` (..., C + 1) and `prompt_logits` (..., K) of an output; returns fused
        class logits (..., C + 1), float32.
        """
        # Rows of NaN are queries that ViT-P was not asked about; they keep the generator's answer.
        asked = ~prompt_logits.isnan().all(-1, keepdim=True)
        fused = fuse_class_logits(
            class_queries_logits,
            torch.where(asked, prompt_logits, 0),
            self.config.alpha_of(task or self.config.task) if alpha is None else alpha,
            self.config.normalization,
            self.label_match.class_matches,
        )
        return torch.where(asked, fused, class_queries_logits.to(fused.dtype))

    @torch.no_grad()
    def _generate(self, pixel_values: Tensor, pixel_mask: Tensor | None, task: str) -> tuple[Tensor, Tensor]:
        """Class and mask logits of the generator."""
        # Transformers' models expect images in the type of their weights. Not `.dtype`, the type of just any parameter:
        # a model may keep a few of them in another type.
        kernels = (weight.dtype for weight in self.generator.parameters() if weight.ndim == 4)
        inputs: dict[str, Any] = {"pixel_values": pixel_values.to(next(kernels, pixel_values.dtype))}
        # Passed only if given: not every generator knows the argument.
        if pixel_mask is not None:
            inputs["pixel_mask"] = pixel_mask
        if self.config.task_inputs is not None:
            tokens = torch.tensor(self.config.task_inputs[task], device=pixel_values.device)
            inputs["task_inputs"] = tokens.expand(len(pixel_values), -1)
        outputs = self.generator(**inputs)
        class_logits = getattr(outputs, "class_queries_logits", None)
        mask_logits = getattr(outputs, "masks_queries_logits", None)
        num_classes = len(self.label_match.class_matches)
        if class_logits is None or mask_logits is None:
            raise ValueError(
                f"the generator {type(self.generator).__name__} answers with {', '.join(outputs)}; fusion needs "
                "class_queries_logits and masks_queries_logits, as a Mask2Former has them"
            )
        if class_logits.shape[-1] != num_classes + 1:
            raise ValueError(
                f"the generator {type(self.generator).__name__} answers with {class_logits.shape[-1]} class logits, "
                f"but its id2label names {num_classes} classes, which with no-object makes {num_classes + 1}; correct "
                "id2label in its config"
            )
        return class_logits, mask_logits

    def _points(
        self,
        mask_logits: Tensor,
        input_size: tuple[int, int],
        content_sizes: Tensor | None,
        patch_offsets: Tensor | None,
        original_sizes: Tensor | None,
    ) -> Tensor:
        geometry = self.config.official_geometry
        if original_sizes is not None and geometry != "oneformer":
            raise ValueError(
                "the inputs were made by a processor of official_geometry='oneformer', whose image for ViT-P is "
                f"padded, but the model's config has official_geometry={geometry!r}; use the same for both"
            )
        if geometry is None:
            return query_points(mask_logits, input_size, content_sizes, patch_offsets)
        return official_query_points(mask_logits, input_size, geometry, content_sizes, original_sizes)


def _generator_from_config(config: PreTrainedConfig) -> Any:
    # By name of the type: remote code from a checkpoint has one copy of a class for each file that imports it.
    if config.model_type == EoMTConfig.model_type:
        return EoMTForUniversalSegmentation(config)  # type: ignore[arg-type]
    if config.model_type == Mask2FormerViTConfig.model_type:
        return Mask2FormerViTForUniversalSegmentation(config)  # type: ignore[arg-type]
    return restore_mask_annealing(AutoModelForUniversalSegmentation.from_config(config))


def _check_images(
    images: Tensor | None, content_sizes: Tensor | None, patch_offsets: Tensor | None, num_rows: int
) -> Tensor:
    """The classifier's images, if they and all sizes match the generator's input."""
    if images is None:
        raise ValueError(
            "classifier_pixel_values are missing: ViT-P looks at the images too; make the inputs with a "
            "ViTPFusionImageProcessor, or pass alpha=0 for the generator's answer"
        )
    expected = len(images) if patch_offsets is not None else num_rows
    for name, value, count in (
        ("classifier_pixel_values", images, expected),
        ("content_sizes", content_sizes, expected),
        ("patch_offsets", patch_offsets, num_rows),
    ):
        if value is not None and len(value) != count:
            raise ValueError(
                f"{name} has {len(value)} rows, but pixel_values call for {count}; give the model all that one call of "
                "the processor returned"
            )
    return images


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    unknown = [name for name, value in kwargs.items() if value is not None]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: not understood here; the generator is frozen, so train it and the ViT-P on their "
            "own and join them afterwards"
        )


def classify_rows(
    classifier: ViTPForPointClassification,
    images: Tensor,
    prompts: Tensor,
    image_of_row: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Logits (R, Q, K) of `prompts` (R, Q, 4), NaN where not wanted; each image (B, 3, height, width) is encoded once.

    Args:
        image_of_row: (R,) index of each row's image, ascending; `None`: rows are images.
        wanted: (R, Q) bool, the prompts to classify; `None`: all.
    """
    images = images.to(classifier.dtype)
    if image_of_row is None and wanted is None:
        return classifier(images, prompts).logits
    num_rows, num_queries = prompts.shape[:2]
    if image_of_row is None:
        image_of_row = torch.arange(num_rows, device=prompts.device)
    if wanted is None:
        wanted = torch.ones(num_rows, num_queries, dtype=torch.bool, device=prompts.device)

    asked = wanted.nonzero()  # (n, 2) row and query, in the order of rows and so of images
    image = image_of_row[asked[:, 0]]
    counts = torch.bincount(image, minlength=len(images))
    # Index of each prompt among those of its image, which are contiguous because rows are ordered by image.
    slot = torch.arange(len(asked), device=prompts.device) - (counts.cumsum(0) - counts)[image]
    logits = prompts.new_full((num_rows, num_queries, classifier.num_labels), torch.nan)
    if len(asked):
        size = len(images), int(counts.max())
        packed = prompts.new_zeros(*size, 4)
        packed[image, slot] = prompts[asked[:, 0], asked[:, 1]]
        real = torch.zeros(size, dtype=torch.bool, device=prompts.device)
        real[image, slot] = True
        answers = classifier(images, packed, real).logits
        logits = logits.to(answers.dtype)
        logits[asked[:, 0], asked[:, 1]] = answers[image, slot]
    return logits

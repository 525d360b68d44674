"""The models to train from scratch on CamVid, each with its recipe: EoMT, its baseline, and two of Transformers.

A `Recipe` defines how to build a model, how it takes a batch, how its output becomes class scores, and how it is
optimised. All use AdamW, no weight decay on vectors, a linear warm-up and a polynomial decay, no dropout and no
stochastic depth (a few epochs do not overfit). Learning rates: see `Recipe.tried`; weights
from scratch want hotter ones than fine-tuning. B batch, C classes, H W pixels, h w cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from camvid_data import INPUT, LABELS
from torch import Tensor, nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
)

from hf_segvit.data.augmentation import AugmentedSample
from hf_segvit.data.collation import MaskCollator
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.configuration_mask2former_vit import Mask2FormerViTConfig
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from hf_segvit.training.annealing import MaskAnnealing

POWER = 0.9
WARMUP = 0.05  # share of the budget
IGNORED = 255
NUM_QUERIES = 24  # for 11 classes; of both models that have queries
SHARES = 120_000  # parts of the budget, as steps of the annealing
NUM_POINTS = 1024  # of both mask losses; a crop has 1728 cells at stride 4


@dataclass(frozen=True)
class Recipe:
    """How one of the models is trained.

    Attributes:
        build: a new model with random weights.
        processor: the image processor that goes with it.
        collate: samples to the model's arguments.
        scores: its output to class scores (B, C, h, w), of which the largest wins.
        batch_size: crops of a step.
        learning_rate: the highest, chosen from `tried`.
        tried: learning rates that were compared in short pilots.
        weight_decay: on matrices.
        max_grad_norm: gradients are scaled down to this norm.
        on_progress: called before each step with the share of the budget that is used.
    """

    build: Callable[[], Any]
    processor: Callable[[], Any]
    collate: Callable[[Sequence[AugmentedSample]], dict[str, Any]]
    scores: Callable[[Any], Tensor]
    batch_size: int
    learning_rate: float
    tried: tuple[float, ...]
    weight_decay: float
    max_grad_norm: float
    on_progress: Callable[[Any, float], None] = lambda model, share: None


def learning_rate_factor(share: float) -> float:
    """Share of the highest learning rate at a share of the budget: linear warm-up, then (1 - t) ** 0.9 down to 0."""
    if share < WARMUP:
        return share / WARMUP
    return (1 - min(1.0, (share - WARMUP) / (1 - WARMUP))) ** POWER


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


PLAIN_VIT = {
    "id2label": LABELS,
    "image_size": list(INPUT),
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "intermediate_size": 576,
    "num_register_tokens": 0,
    "layer_scale_init_value": None,
    "initializer_range": 0.07,  # about 1 / sqrt(hidden_size): nothing is pretrained here
    "num_queries": NUM_QUERIES,
    "train_num_points": NUM_POINTS,
}


def build_eomt() -> EoMTForUniversalSegmentation:
    """EoMT with a small plain ViT."""
    config = EoMTConfig(**PLAIN_VIT, position_embedding_type="learned_rope", num_query_layers=2)
    return EoMTForUniversalSegmentation(config)


def build_row0() -> Mask2FormerViTForUniversalSegmentation:
    """ViT-Adapter with Mask2Former on the same ViT, row 0 of the EoMT paper's Table 1."""
    config = Mask2FormerViTConfig(
        **PLAIN_VIT,
        removed="nothing",
        decoder_hidden_size=96,
        num_decoder_layers=3,
        num_decoder_attention_heads=6,
        decoder_intermediate_size=384,
        num_pixel_decoder_layers=2,
        pixel_decoder_intermediate_size=192,
        adapter_stem_channels=32,
    )
    return Mask2FormerViTForUniversalSegmentation(config)


def build_segformer() -> SegformerForSemanticSegmentation:
    """SegFormer-B0, which Transformers' defaults describe."""
    config = SegformerConfig(
        id2label=LABELS, drop_path_rate=0.0, classifier_dropout_prob=0.0, semantic_loss_ignore_index=IGNORED
    )
    return SegformerForSemanticSegmentation(config)


def build_mask2former() -> Mask2FormerForUniversalSegmentation:
    """Mask2Former with Swin-T."""
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        id2label=LABELS, backbone_config=backbone, num_queries=NUM_QUERIES, train_num_points=NUM_POINTS
    )
    return Mask2FormerForUniversalSegmentation(config)


def collate_masks(samples: Sequence[AugmentedSample]) -> dict[str, Any]:
    """For Mask2Former: floating-point masks. It cannot leave void out of the loss, so void belongs to no mask."""
    batch = MaskCollator()(samples)
    return batch | {"mask_labels": [masks.float() for masks in batch["mask_labels"]]}


def collate_label_maps(samples: Sequence[AugmentedSample]) -> dict[str, Any]:
    """For SegFormer: `labels` (B, H, W) with IGNORED for void and padding."""
    pixel_values = MaskCollator()(samples)["pixel_values"]
    maps = []
    for sample in samples:
        table = torch.cat([sample.labels, torch.tensor([IGNORED])])  # -1 takes the last
        maps.append(table[sample.segment_map.long()])
    return {"pixel_values": pixel_values, "labels": torch.stack(maps)}


def mask_scores(output: Any) -> Tensor:
    """Scores from masks: for each class, the sum over queries of class probability times mask probability."""
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", classes, output.masks_queries_logits.sigmoid())


def predict(model: nn.Module, recipe: Recipe, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps (B, H, W) of `size`: scores are enlarged before the best is taken, for every model alike."""
    with torch.inference_mode():
        scores = recipe.scores(model(pixel_values=pixel_values))
        return F.interpolate(scores.float(), size, mode="bilinear").argmax(1)


def _anneal(model: EoMTForUniversalSegmentation, share: float) -> None:
    model.set_masked_attention_probabilities(
        MaskAnnealing.by_rule(SHARES, model.config.num_query_layers).probabilities(round(SHARES * min(share, 1.0)))
    )


_SIZE = {"height": INPUT[0], "width": INPUT[1]}
RECIPES = {
    "eomt": Recipe(
        build=build_eomt,
        processor=lambda: EoMTImageProcessor(task="semantic", size=_SIZE, do_split_image=False, num_labels=len(LABELS)),
        collate=MaskCollator(with_loss_mask=True),
        scores=mask_scores,
        batch_size=4,
        learning_rate=1e-3,
        tried=(5e-4, 1e-3, 2e-3),
        weight_decay=0.05,
        max_grad_norm=1.0,
        on_progress=_anneal,
    ),
    "row0": Recipe(
        build=build_row0,
        processor=lambda: EoMTImageProcessor(task="semantic", size=_SIZE, do_split_image=False, num_labels=len(LABELS)),
        collate=MaskCollator(with_loss_mask=True),
        scores=mask_scores,
        batch_size=4,
        learning_rate=1e-3,
        tried=(1e-3,),
        weight_decay=0.05,
        max_grad_norm=1.0,
    ),
    "segformer": Recipe(
        build=build_segformer,
        processor=lambda: SegformerImageProcessor(size=_SIZE),
        collate=collate_label_maps,
        scores=lambda output: output.logits,
        batch_size=4,
        learning_rate=1e-3,
        tried=(1e-3, 2e-3),
        weight_decay=0.01,
        max_grad_norm=1.0,
    ),
    "mask2former": Recipe(
        build=build_mask2former,
        processor=lambda: Mask2FormerImageProcessor(
            size=_SIZE, size_divisor=16, num_labels=len(LABELS), ignore_index=IGNORED
        ),
        collate=collate_masks,
        scores=mask_scores,
        batch_size=2,
        learning_rate=3e-4,
        tried=(3e-4, 1e-3),
        weight_decay=0.05,
        max_grad_norm=1.0,
    ),
}

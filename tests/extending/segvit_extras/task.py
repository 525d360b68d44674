"""A model to train: one linear layer on the patches of a plain ViT, a classic measure of a backbone."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from hf_segvit import PlainViTConfig, PlainViTModel
from hf_segvit.models.modeling_plain_vit import PlainViTPreTrainedModel
from hf_segvit.training.tasks.segmentation import SegmentationTask


class LinearProbe(PlainViTPreTrainedModel):
    """Classifies each patch. For the post-processing, every class is a query that is certain of its class."""

    def __init__(self, config):
        super().__init__(config)
        self.plain_vit = PlainViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        config, (height, width) = self.config, pixel_values.shape[-2:]
        patches = self.plain_vit(pixel_values).last_hidden_state[:, config.num_prefix_tokens :]
        grid = height // config.patch_size, width // config.patch_size
        logits = self.classifier(patches).transpose(1, 2).unflatten(2, grid)
        sure = 100.0 * torch.eye(config.num_labels, config.num_labels + 1, device=logits.device)
        return ModelOutput(class_queries_logits=sure.expand(len(logits), -1, -1), masks_queries_logits=logits)


class LinearProbeTask(SegmentationTask):
    """Semantic segmentation with cross-entropy; void is ignored."""

    tasks = ("semantic",)

    def build_model(self):
        fields = {"image_size": list(self.size), **self.recipe.model_config, **self.labels}
        model = LinearProbe(PlainViTConfig(**fields))
        model.plain_vit.requires_grad_(False)
        return model, self.new_processor()

    def loss(self, model, batch, normalizers):
        logits = model(batch["pixel_values"]).masks_queries_logits
        pairs = zip(batch["mask_labels"], batch["class_labels"], strict=True)
        truth = torch.stack([class_map(masks, labels) for masks, labels in pairs])
        logits = F.interpolate(logits, size=truth.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, truth) / normalizers, {}


def class_map(masks, labels):
    """Label ids (H, W) of masks (n, H, W); -100 is void."""
    truth = torch.full(masks.shape[1:], -100, device=masks.device)
    for mask, label in zip(masks.bool(), labels, strict=True):
        truth[mask] = label
    return truth

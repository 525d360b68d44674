"""Tiny generators of every kind that fusion knows, with random weights, and a tiny ViT-P to go with them."""

import torch
from PIL import Image
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)

from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification

from .tiny_models import randomize, tiny_eomt, tiny_mask2former_vit

LABELS = {0: "road", 1: "grass", 2: "car", 3: "dog", 4: "person"}
NUM_QUERIES = 7
TASK_INPUTS = {"panoptic": [1, 2, 3, 4, 0, 0], "instance": [1, 2, 3, 5, 0, 0], "semantic": [1, 2, 3, 6, 0, 0]}
_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
_EOMT = {**_VIT, "num_queries": NUM_QUERIES, "num_blocks": 2, "num_upscale_blocks": 2}


def _swin() -> SwinConfig:
    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _mask2former(labels):
    config = Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=NUM_QUERIES,
        id2label=labels,
    )
    return Mask2FormerForUniversalSegmentation(config)


def _maskformer(labels):
    config = MaskFormerConfig(
        backbone_config=_swin(),
        decoder_config={
            "model_type": "detr",
            "d_model": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "num_queries": NUM_QUERIES,
        },
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=labels,
    )
    return MaskFormerForInstanceSegmentation(config)


def _oneformer(labels):
    config = OneFormerConfig(
        backbone_config=_swin(),
        num_queries=NUM_QUERIES,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        dim_feedforward=32,
        num_attention_heads=2,
        decoder_layers=2,
        query_dec_layers=1,
        task_seq_len=6,
        max_seq_len=4,
        is_training=False,
        text_encoder_width=32,
        text_encoder_context_length=4,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=32,
        id2label=labels,
    )
    return OneFormerForUniversalSegmentation(config)


_BUILDERS = {
    "segvit_eomt": lambda labels: tiny_eomt(id2label=labels, num_queries=NUM_QUERIES),
    "segvit_mask2former_vit": lambda labels: tiny_mask2former_vit(id2label=labels, num_queries=NUM_QUERIES),
    "eomt": lambda labels: EomtForUniversalSegmentation(EomtConfig(**_EOMT, mlp_ratio=2, id2label=labels)),
    "eomt_dinov3": lambda labels: EomtDinov3ForUniversalSegmentation(
        EomtDinov3Config(**_EOMT, intermediate_size=48, id2label=labels)
    ),
    "mask2former": _mask2former,
    "maskformer": _maskformer,
    "oneformer": _oneformer,
}
GENERATORS = tuple(_BUILDERS)


def tiny_generator(kind: str, labels: dict[int, str] = LABELS):
    """A generator of one of `GENERATORS` for 64 x 64 pixels, in evaluation mode."""
    torch.manual_seed(0)
    model = _BUILDERS[kind](dict(labels))
    return randomize(model).eval()


def tiny_classifier(labels: dict[int, str] = LABELS, **overrides) -> ViTPForPointClassification:
    """A ViT-P for 56 x 56 pixels, in evaluation mode."""
    torch.manual_seed(1)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 56,
        "patch_size": 14,
    }
    return randomize(ViTPForPointClassification(ViTPConfig(**{**settings, **overrides}, id2label=dict(labels)))).eval()


def noise_images(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """The same images of noise at every call, of given (width, height)."""
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())
        for width, height in sizes
    ]

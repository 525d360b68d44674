"""Configuration of Mask2Former on a plain ViT, whole or with parts removed.

The fields of the plain ViT, plus what is removed, adapter, decoders and loss. With nothing removed it is the
ViT-Adapter (Chen et al., arXiv 2205.08534) with Mask2Former (Cheng et al., arXiv 2112.01527); each further removal is a
row of Table 1 of EoMT (Kerssies et al., arXiv 2503.19108), up to the transformer decoder, without which it is EoMT.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_eomt import check_loss_fields, check_probabilities, criterion_arguments
from .configuration_plain_vit import PlainViTConfig, check_label_ids, check_limits

# In the order of removal: each value stands for its part and for all before it.
REMOVABLE_PARTS = ("nothing", "adapter", "pixel_decoder", "multi_scale")
NUM_INTERACTIONS = 4  # of the adapter with the ViT
PATCH_SIZE = 16
COARSEST_STRIDE = 32
NUM_DECODER_SCALES = 3  # strides 8, 16 and 32
# Groups of the pixel decoder's GroupNorms.
_NUM_GROUPS = 32
# Limits far beyond any published model, so that no file can ask for memory without end.
_LIMITS = {
    "num_queries": (1, 2**16),
    "train_num_points": (1, 2**20),
    "decoder_hidden_size": (_NUM_GROUPS, 2**14),
    "num_decoder_layers": (1, 1000),
    "num_decoder_attention_heads": (1, 2**10),
    "decoder_intermediate_size": (1, 2**18),
    "num_pixel_decoder_layers": (1, 1000),
    "pixel_decoder_intermediate_size": (1, 2**18),
    "adapter_stem_channels": (1, 2**14),
    "num_adapter_attention_heads": (1, 2**12),
}


@strict
class Mask2FormerViTConfig(PlainViTConfig):
    """Configuration of `Mask2FormerViTModel` and `Mask2FormerViTForUniversalSegmentation`.

    Args:
        removed: the last part that is left out, in this order: `"nothing"`, the `"adapter"` (a pyramid of transposed
            and strided convolutions replaces it), the `"pixel_decoder"`, `"multi_scale"` features. Each value leaves
            out all before it: rows 0 to 3 of Table 1 of EoMT. Rows 4 and 5 are `EoMTConfig`.
        num_queries: number Q of queries, the most segments an image can have.
        decoder_hidden_size: channels of queries and features in both decoders; a multiple of 32.
        num_decoder_layers: layers of the transformer decoder.
        num_decoder_attention_heads: heads in both decoders.
        decoder_intermediate_size: hidden width of the MLPs of the transformer decoder.
        num_pixel_decoder_layers: layers of deformable attention in the pixel decoder.
        pixel_decoder_intermediate_size: hidden width of their MLPs.
        adapter_stem_channels: channels of the adapter's first convolutions.
        num_adapter_attention_heads: heads of its deformable attention; `None` is one for each 64 channels.
        adapter_value_ratio: width of the values of its deformable attention, relative to `hidden_size`.
        adapter_mlp_ratio: hidden width of its MLPs, relative to `hidden_size`.
        masked_attention: `False` disables attention masks and intermediate predictions, also in training.
        masked_attention_probabilities: per decoder layer, the probability that a query is confined to its own mask, as
            in `EoMTConfig`; `None` is 1 everywhere, which is Mask2Former. With all at 0, inference predicts masks once.
        no_object_weight, class_weight, mask_weight, dice_weight: weights of the loss, as in `EoMTConfig`.
        train_num_points, oversample_ratio, importance_sample_ratio, loss_normalization: of the loss, as there.
    """

    model_type = "segvit_mask2former_vit"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "loss_dict",
        "auxiliary_logits",
        "last_hidden_state",
        "hidden_states",
        "attentions",
        "content_sizes",
        "patch_offsets",
    ]

    removed: str = "nothing"
    num_queries: int = 200
    decoder_hidden_size: int = 256
    num_decoder_layers: int = 9
    num_decoder_attention_heads: int = 8
    decoder_intermediate_size: int = 2048
    num_pixel_decoder_layers: int = 6
    pixel_decoder_intermediate_size: int = 1024
    adapter_stem_channels: int = 64
    num_adapter_attention_heads: int | None = None
    adapter_value_ratio: float | int = 0.5
    adapter_mlp_ratio: float | int = 0.25
    masked_attention: bool = True
    masked_attention_probabilities: list[float] | list[int] | list[float | int] | None = None
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    loss_normalization: str = "global"

    def __post_init__(self, **kwargs: Any):
        if self.num_adapter_attention_heads is None:
            whole = self.hidden_size % 64 == 0
            self.num_adapter_attention_heads = self.hidden_size // 64 if whole else self.num_attention_heads
        if (
            self.masked_attention_probabilities is None
            and 0 < self.num_decoder_layers <= _LIMITS["num_decoder_layers"][1]
        ):
            self.masked_attention_probabilities = [1.0] * self.num_decoder_layers
        super().__post_init__(**kwargs)

    def has(self, part: str) -> bool:
        """Whether a part of `REMOVABLE_PARTS` is in the model."""
        return REMOVABLE_PARTS.index(part) > REMOVABLE_PARTS.index(self.removed)

    @property
    def size_multiple(self) -> int:
        """Pixels that the model pads both sides to a multiple of: those of a cell of its coarsest features."""
        return COARSEST_STRIDE if self.has("multi_scale") else PATCH_SIZE

    @property
    def adapter_value_size(self) -> int:
        """Width of the values of the adapter's deformable attention."""
        return int(self.hidden_size * self.adapter_value_ratio)

    def criterion_arguments(self) -> dict[str, Any]:
        """Arguments of the `MaskCriterion` for this configuration."""
        return criterion_arguments(self)

    def check(self) -> None:
        """Refuse contradictory fields with a ValueError that names the field, its value and the remedy."""
        # First, or image sizes would be held against a patch size that they cannot have.
        if self.patch_size != PATCH_SIZE:
            raise ValueError(
                f"patch_size={self.patch_size} must be {PATCH_SIZE}: the strides of the features are 4 to "
                f"{COARSEST_STRIDE} pixels; from_backbone(..., patch_size={PATCH_SIZE}) resamples the patch kernel"
            )
        super().check()
        if self.removed not in REMOVABLE_PARTS:
            raise ValueError(f"removed={self.removed!r} is not one of {REMOVABLE_PARTS}")
        check_label_ids(self.id2label)
        check_limits(self, _LIMITS)
        check_loss_fields(self)
        check_probabilities(self.masked_attention_probabilities, self.num_decoder_layers, "decoder layers")
        if self.decoder_hidden_size % _NUM_GROUPS or self.decoder_hidden_size % self.num_decoder_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={self.decoder_hidden_size} must be a multiple of {_NUM_GROUPS} and of "
                f"num_decoder_attention_heads={self.num_decoder_attention_heads}"
            )
        if not self.has("pixel_decoder") and self.has("multi_scale") and self.num_decoder_layers < NUM_DECODER_SCALES:
            # Weights without a gradient stop distributed training; a pixel decoder mixes the maps.
            raise ValueError(
                f"num_decoder_layers={self.num_decoder_layers}: without a pixel decoder the layers read the maps of "
                f"{NUM_DECODER_SCALES} scales in turn; take at least {NUM_DECODER_SCALES}, or removed='multi_scale'"
            )
        if self.has("adapter"):
            self._check_adapter()

    def _check_adapter(self) -> None:
        if self.num_hidden_layers < NUM_INTERACTIONS:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}: the adapter interacts with {NUM_INTERACTIONS} groups of "
                f"blocks, so the ViT needs at least {NUM_INTERACTIONS}; take a deeper backbone, or removed='adapter'"
            )
        for name in ("adapter_value_ratio", "adapter_mlp_ratio"):
            if not 0 < getattr(self, name) <= 16 or int(self.hidden_size * getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, at most 16, and leave a channel")
        heads = self.num_adapter_attention_heads
        assert heads is not None  # set after the fields
        if self.hidden_size % heads or self.adapter_value_size % heads:
            raise ValueError(
                f"num_adapter_attention_heads={heads} does not divide hidden_size={self.hidden_size} and the width "
                f"{self.adapter_value_size} of the values (adapter_value_ratio={self.adapter_value_ratio})"
            )

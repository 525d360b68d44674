"""Mask2Former on a plain ViT, whole or with parts removed (EoMT's Table 1).

In order: outputs, the feature pyramid, the model up to mask logits, the model with class head and loss. Pixel decoder
and transformer decoder are Transformers' own (Mask2Former, arXiv 2112.01527); the adapter is in `vit_adapter.py`.

Shapes: B batch, Q queries, C classes without no-object, D hidden size of the ViT, E of the decoders, H W pixels,
h w patch grid; P predictions, the final one last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderOutput,
    Mask2FormerPixelDecoder,
    Mask2FormerPredictionBlock,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_eomt import set_probabilities
from .configuration_mask2former_vit import PATCH_SIZE, Mask2FormerViTConfig
from .inference_optimization import compile_module
from .mask2former_annealing import anneal_decoder
from .mask_criterion import MaskCriterion, MaskPrediction, validate_targets
from .mask_head import EoMTScaleBlock, EoMTScaleLayer, initialize_by_default
from .modeling_plain_vit import PlainViTModel, PlainViTPreTrainedModel
from .vit_adapter import DeformableAttention, ViTAdapter, initialize_adapter

STRIDES = (4, 8, 16, 32)


@dataclass
class Mask2FormerViTModelOutput(ModelOutput):
    """Output of `Mask2FormerViTModel`."""

    last_hidden_state: Tensor | None = None  # (B, prefix + h * w, D); an adapter's ViT has no final norm
    # P predictions. Training predicts before every decoder layer, inference only before masked ones.
    masks_queries_logits: tuple[Tensor, ...] | None = None  # P of (B, Q, H / 4, W / 4)
    query_hidden_states: tuple[Tensor, ...] | None = None  # P of (B, Q, E), normed
    hidden_states: tuple[Tensor, ...] | None = None  # on request, input and output of every block
    attentions: tuple[Tensor, ...] | None = None  # on request, attention weights of every block


@dataclass
class Mask2FormerViTForUniversalSegmentationOutput(ModelOutput):
    """Output of `Mask2FormerViTForUniversalSegmentation`, as every Mask2Former-style post-processor takes it."""

    loss: Tensor | None = None  # total, summed over all predictions
    loss_dict: dict[str, Tensor] | None = None  # its unweighted terms by layer, without gradient
    class_queries_logits: Tensor | None = None  # (B, Q, C + 1), no-object last
    masks_queries_logits: Tensor | None = None  # (B, Q, H / 4, W / 4), before the sigmoid
    auxiliary_logits: list[dict[str, Tensor]] | None = None  # on request, both logits of all but the final prediction
    last_hidden_state: Tensor | None = None  # as in Mask2FormerViTModelOutput
    hidden_states: tuple[Tensor, ...] | None = None  # on request, as in Mask2FormerViTModelOutput
    attentions: tuple[Tensor, ...] | None = None  # on request, as in Mask2FormerViTModelOutput
    # Passed through from the image processor to its post-processing.
    content_sizes: Tensor | None = None
    patch_offsets: Tensor | None = None


class StridedConv2x2(nn.Conv2d):
    """Convolution with stride equal to its kernel, on channels-last features."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, hidden_size, kernel_size=2, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """Downscale (B, h, w, D) to (B, h / 2, w / 2, D)."""
        return super().forward(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DownscaleLayer(EoMTScaleLayer):
    """`EoMTScaleLayer` in the other direction: twofold downscaling."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__(hidden_size, hidden_act)
        self.conv1 = StridedConv2x2(hidden_size)  # type: ignore[assignment]


class FeaturePyramid(nn.Module):
    """Features of several strides, each scaled from the patches on its own (Li et al., arXiv 2203.16527)."""

    def __init__(self, config: Mask2FormerViTConfig, strides: tuple[int, ...]):
        super().__init__()
        scales: list[nn.Module] = []
        for stride in strides:
            if stride > PATCH_SIZE:
                scales.append(DownscaleLayer(config.hidden_size, config.hidden_act))
            else:
                steps = (PATCH_SIZE // stride).bit_length() - 1
                scales.append(EoMTScaleBlock(config.hidden_size, config.hidden_act, steps))
        self.scales = nn.ModuleList(scales)

    def forward(self, patches: Tensor) -> list[Tensor]:
        """Maps (B, D, H / stride, W / stride) of patches (B, h, w, D)."""
        return [scale(patches).permute(0, 3, 1, 2) for scale in self.scales]


class Mask2FormerViTPreTrainedModel(PlainViTPreTrainedModel):
    """Base of both models: initial weights, and loading."""

    config: Mask2FormerViTConfig
    base_model_prefix = "mask2former"

    @classmethod
    def from_backbone(
        cls, source: Any, image_size: Any = None, patch_size: int | None = PATCH_SIZE, **kwargs: Any
    ) -> Any:
        """Start from another library's backbone, whose patch kernel is resampled; see `PlainViTPreTrainedModel`."""
        return super().from_backbone(source, image_size, patch_size, **kwargs)

    def set_masked_attention_probabilities(self, probabilities: float | Sequence[float]) -> None:
        """Set the probability that a query is confined to its own mask, one for all decoder layers or one for each."""
        set_probabilities(self.config, probabilities, self.config.num_decoder_layers, "decoder layers")

    @cached_property
    def _transformers(self) -> Mask2FormerPreTrainedModel:
        """Transformers' rules of initial weights, without a model."""
        return Mask2FormerPreTrainedModel(transformers_config(self.config))

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # For models of other packages Transformers skips modules without parameters of their own, lest code that heeds
        # no flags overwrites loaded weights. Ours heeds them, and its rules for such modules set their children's.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        owner = self._owners.get(module)
        # Three rules of newer versions of Transformers, which older ones lack.
        if owner == "transformer_module" and isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, Mask2FormerPixelDecoder):
            init.normal_(module.level_embed)
        elif isinstance(module, Mask2FormerPredictionBlock):
            for layer in module.children():
                if isinstance(layer, nn.Linear):
                    initialize_by_default(layer)
        elif isinstance(module, DeformableAttention) or owner in ("pixel_decoder", "transformer_module", "class_head"):
            self._transformers._init_weights(module)
        elif owner == "adapter":
            initialize_adapter(module, self.config.initializer_range)
        elif owner == "pyramid" and isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            initialize_by_default(module)
        else:
            super()._init_weights(module)

    @cached_property
    def _owners(self) -> dict[nn.Module, str]:
        """The part that a module belongs to, for modules outside of the ViT."""
        parts = {"adapter", "pyramid", "pixel_decoder", "mask_projection", "transformer_module"}
        base = self.base_model
        named = [(name, part) for name, part in base.named_children() if name in parts]
        owners = {module: name for name, part in named for module in part.modules()}
        if base is not self:
            owners[self.get_submodule("class_predictor")] = "class_head"
        return owners


class Mask2FormerViTModel(Mask2FormerViTPreTrainedModel, PlainViTModel):
    """The plain ViT with what the configuration has of adapter, pixel decoder and scales, and a transformer decoder."""

    _keys_to_ignore_on_load_unexpected = [r"^class_predictor\."]  # noqa: RUF012

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__(config)
        theirs, width = transformers_config(config), config.hidden_size
        self.adapter: ViTAdapter | None = None
        self.pyramid: FeaturePyramid | None = None
        if config.has("adapter"):
            self.adapter = ViTAdapter(config)
            # The adapter reads the stream as it is, and a norm without gradient would stop distributed training.
            self.layernorm = nn.Identity()
        else:
            self.pyramid = FeaturePyramid(config, STRIDES if config.has("multi_scale") else (4, 16))
        self.pixel_decoder: Mask2FormerPixelDecoder | None = None
        self.mask_projection: nn.Conv2d | None = None
        if config.has("pixel_decoder"):
            self.pixel_decoder = Mask2FormerPixelDecoder(theirs, feature_channels=[width] * len(STRIDES))
            # Made by a constructor that no default device reaches.
            self.pixel_decoder.level_embed = nn.Parameter(torch.empty(self.pixel_decoder.level_embed.shape))
            self.transformer_module = Mask2FormerTransformerModule(config.decoder_hidden_size, theirs)
        else:
            self.mask_projection = nn.Conv2d(width, config.decoder_hidden_size, kernel_size=1)
            theirs.enforce_input_projection = True  # also of a ViT that is as wide as the decoder
            self.transformer_module = Mask2FormerTransformerModule(width, theirs)
            # Older versions of Transformers keep them in a plain list, and their weights out of every checkpoint.
            projections = nn.ModuleList(self.transformer_module.input_projections)
            self.transformer_module.input_projections = projections
        anneal_decoder(self.transformer_module.decoder, config)
        if not config.has("multi_scale"):
            # All layers of the decoder read the one map that there is.
            self.transformer_module.num_feature_levels = self.transformer_module.decoder.num_feature_levels = 1
            self.transformer_module.input_projections = self.transformer_module.input_projections[:1]
            self.transformer_module.level_embed = nn.Embedding(1, config.decoder_hidden_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Mask2FormerViTModelOutput:
        """Predict the masks of images (B, channels, H, W), normalised, with sides that are multiples of 16.

        Sides are padded to `config.size_multiple` on the right and below, and the masks cropped again. `kwargs` are
        `output_hidden_states`, `output_attentions` (needs the eager back-end) and `return_dict`.
        """
        height, width = pixel_values.shape[-2:]
        features, last_hidden_state = self.encode(self._padded(pixel_values))
        multi_scale_features, mask_features = self.decode_pixels(features)
        decoded: Any = self.decode_queries(multi_scale_features, mask_features)
        return Mask2FormerViTModelOutput(
            last_hidden_state=last_hidden_state,
            masks_queries_logits=tuple(
                logits[..., : height // STRIDES[0], : width // STRIDES[0]] for logits in decoded.masks_queries_logits
            ),
            query_hidden_states=tuple(states.transpose(0, 1) for states in decoded.intermediate_hidden_states),
        )

    def _padded(self, pixel_values: Tensor) -> Tensor:
        """Images with zeros, the mean colour, on the right and below, up to whole cells of the coarsest features."""
        height, width = pixel_values.shape[-2:]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            return pixel_values  # the patch embedding refuses them
        multiple = self.config.size_multiple
        if height % multiple == 0 and width % multiple == 0:
            return pixel_values
        return F.pad(pixel_values, (0, -width % multiple, 0, -height % multiple))

    def encode(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features (B, D, H / stride, W / stride), the finest first, and the ViT's tokens (B, prefix + h * w, D)."""
        config = self.config
        hidden_states = self.embeddings(pixel_values)
        position_embeddings = self.position_embeddings_for(pixel_values, config.num_prefix_tokens)
        grid_size = (pixel_values.shape[-2] // PATCH_SIZE, pixel_values.shape[-1] // PATCH_SIZE)
        if self.adapter is not None:
            return self.adapter(pixel_values, hidden_states, self.layers, position_embeddings, grid_size)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings)
        hidden_states = self.layernorm(hidden_states)
        assert self.pyramid is not None
        return self.pyramid(hidden_states[:, config.num_prefix_tokens :].unflatten(1, grid_size)), hidden_states

    def decode_pixels(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Maps for the transformer decoder, the coarsest first, and mask features (B, E, H / 4, W / 4)."""
        if self.pixel_decoder is not None:
            decoded = self.pixel_decoder(features)
            return list(decoded.multi_scale_features), decoded.mask_features
        assert self.mask_projection is not None
        return features[:0:-1], self.mask_projection(features[0])

    def decode_queries(
        self, multi_scale_features: list[Tensor], mask_features: Tensor
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """The final prediction, after those before decoder layers: in training of all, in inference of masked ones."""
        return self.transformer_module(multi_scale_features=multi_scale_features, mask_features=mask_features)


class Mask2FormerViTForUniversalSegmentation(Mask2FormerViTPreTrainedModel):
    """Mask2Former on a plain ViT with class head and loss; to change only the loss, set `model.criterion`."""

    criterion_class = MaskCriterion

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__(config)
        assert config.num_labels is not None  # id2label always names the classes
        self.num_labels = config.num_labels
        self.mask2former = Mask2FormerViTModel(config)
        self.class_predictor = nn.Linear(config.decoder_hidden_size, self.num_labels + 1)
        self.criterion = self.criterion_class.from_config(config)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "criterion" and type(value) is not MaskCriterion:
            # A record of the loss in every checkpoint, which nothing ever imports.
            self.config.criterion = f"{type(value).__module__}:{type(value).__qualname__}"

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Called by Transformers for classes from a checkpoint's own code."""
        super().register_for_auto_class(auto_class)
        # The image segmentation pipeline accepts only models that this table names.
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.setdefault(Mask2FormerViTConfig.model_type, cls.__name__)

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into tokens."""
        return self.mask2former.get_input_embeddings()

    def optimize_for_inference(
        self,
        *,
        fuse_qkv: bool | None = None,
        channels_last: bool | None = None,
        compile: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> "Mask2FormerViTForUniversalSegmentation":
        """Make inference faster without another checkpoint or other segments; the model itself, in evaluation mode.

        Args:
            fuse_qkv: compute queries, keys and values of the ViT in one product; `None`: where that is faster.
            channels_last: lay out the kernels of convolutions channels-last; `None`: on accelerators.
            compile: compile all up to the masks, once for each size of the input; `None`: on CUDA.
            cuda_graphs: replay compiled kernels as a CUDA graph; `None`: where compiled for CUDA.
        """
        super().optimize_for_inference(fuse_qkv=fuse_qkv, channels_last=channels_last)
        compiled = compile_module(self.mask2former, compile, cuda_graphs)
        self.uses_cuda_graphs = compiled and self.device.type == "cuda" and cuda_graphs is not False
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        loss_mask: Tensor | None = None,
        loss_normalizers: Tensor | None = None,
        content_sizes: Tensor | None = None,
        patch_offsets: Tensor | None = None,
        output_auxiliary_logits: bool = False,
        **kwargs: Any,
    ) -> Mask2FormerViTForUniversalSegmentationOutput:
        """Segment images, and compute the loss if labels are given.

        Args:
            pixel_values: (B, channels, H, W), normalised; H and W multiples of 16.
            mask_labels: per image, (n, H, W) masks of its segments; n may be 0 or exceed Q.
            class_labels: per image, (n,) int64 classes in [0, C).
            loss_mask: (B, H, W) bool, True for pixels that count in matching and loss; `None` counts all.
            loss_normalizers: of `criterion.count_normalizers`, for gradient accumulation; `None` counts this batch.
            content_sizes: (B, 2), returned as given.
            patch_offsets: (B, 3), returned as given.
            output_auxiliary_logits: also return the predictions before decoder layers: in training before all, in
                inference before masked ones.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and targets for a custom criterion:
                lists like `class_labels` whose names end with `_labels`, such as `box_labels`.
        """
        if (mask_labels is None) != (class_labels is None):
            given, missing = ("mask", "class") if class_labels is None else ("class", "mask")
            raise ValueError(f"{given}_labels came without {missing}_labels; the loss needs both")
        others = {name: kwargs.pop(name) for name in list(kwargs) if name.endswith("_labels")}
        if mask_labels is not None and class_labels is not None:
            batch_size = pixel_values.shape[0]
            # Before the forward pass: bad labels should not cost one.
            validate_targets(mask_labels, class_labels, self.num_labels, batch_size, loss_mask, others=others)
        outputs = self.mask2former(pixel_values, **kwargs)
        class_logits = [self.class_predictor(queries) for queries in outputs.query_hidden_states]
        loss = loss_dict = None
        if mask_labels is not None and class_labels is not None:
            pairs = zip(class_logits, outputs.masks_queries_logits, strict=True)
            loss, loss_dict = self.criterion(
                [MaskPrediction(classes, masks) for classes, masks in pairs],
                mask_labels,
                class_labels,
                loss_mask=loss_mask,
                normalizers=loss_normalizers,
                **others,
            )
        auxiliary = None
        if output_auxiliary_logits:
            earlier = zip(class_logits[:-1], outputs.masks_queries_logits[:-1], strict=True)
            names = ("class_queries_logits", "masks_queries_logits")
            auxiliary = [dict(zip(names, pair, strict=True)) for pair in earlier]
        return Mask2FormerViTForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=class_logits[-1],
            masks_queries_logits=outputs.masks_queries_logits[-1],
            auxiliary_logits=auxiliary,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            content_sizes=content_sizes,
            patch_offsets=patch_offsets,
        )


def transformers_config(config: Mask2FormerViTConfig) -> Mask2FormerConfig:
    """The configuration of Transformers' pixel decoder and transformer decoder; that of its backbone has no effect."""
    width = config.decoder_hidden_size
    return Mask2FormerConfig(
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=config.pixel_decoder_intermediate_size,
        encoder_layers=config.num_pixel_decoder_layers,
        dim_feedforward=config.decoder_intermediate_size,
        decoder_layers=config.num_decoder_layers + 1,  # counts the prediction before the first
        num_attention_heads=config.num_decoder_attention_heads,
        num_queries=config.num_queries,
        feature_strides=list(STRIDES),
    )
